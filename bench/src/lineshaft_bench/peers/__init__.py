"""Engines under test, each in a process of its own that speaks JSON lines; files here but `client` know one engine."""
