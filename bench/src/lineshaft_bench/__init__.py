"""Simulates traffic on modelled devices, and measures the engine beside its bounds and other engines."""
