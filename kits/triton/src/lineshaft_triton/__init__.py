"""Kernels in Triton, written once for NVIDIA and AMD GPUs.

Importing this package imports no Triton: whether kernels are interpreted is settled before that (`interpreting`).
"""
