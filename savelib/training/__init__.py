"""Algorithms 1 and 2 and what they need."""
