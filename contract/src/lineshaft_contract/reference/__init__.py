"""The reference backend: every op is its NumPy reference. Slow, for checking; it also enforces the array rule."""
