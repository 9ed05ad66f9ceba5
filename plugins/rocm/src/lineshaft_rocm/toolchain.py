"""Compiles the Triton kernels for GPUs that are not here."""

from __future__ import annotations

from lineshaft_rocm.backend import libraries
from lineshaft_rocm.options import RocmOptions
from lineshaft_triton.toolchain import TritonToolchain


def create(options: RocmOptions) -> TritonToolchain:
    """The toolchain that the plugin registers."""
    return TritonToolchain("rocm", "amd", chosen=options.target, libraries=libraries)
