"""Runs of a study on the unified model: their costs, tables and reports."""
