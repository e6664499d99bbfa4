"""Adapters added to their base for good, a few rows at a time."""
