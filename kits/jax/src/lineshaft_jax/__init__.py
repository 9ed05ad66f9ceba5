"""XLA building blocks for backends: kernels, sessions and programs on JAX arrays.

Nothing here assumes a device; the plugin that builds on it names one.
"""
