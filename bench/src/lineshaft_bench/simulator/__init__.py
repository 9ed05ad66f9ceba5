"""Runs the real scheduler and cache manager against a modelled device, on a clock of its own."""
