"""Checks of a backend, level by level."""
