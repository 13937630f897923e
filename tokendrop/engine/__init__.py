"""Roles executed in somebody else's decoder."""
