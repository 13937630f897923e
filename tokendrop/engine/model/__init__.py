"""Somebody else's model: read by inspection, and swapped."""
