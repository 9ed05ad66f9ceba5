"""The native engine: sessions whose programs are tapes of C kernels, replayed by a team of threads in one call each.

Imports no PyTorch.
"""
