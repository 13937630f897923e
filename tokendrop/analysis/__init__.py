"""What dropping costs and saves."""
