"""Compiles the Triton kernels for GPUs that are not here."""

from __future__ import annotations

from lineshaft_cuda.backend import libraries
from lineshaft_cuda.options import CudaOptions
from lineshaft_triton.toolchain import TritonToolchain


def create(options: CudaOptions) -> TritonToolchain:
    """The toolchain that the plugin registers."""
    return TritonToolchain("cuda", "nvidia", chosen=options.target, libraries=libraries)
