"""The rocm backend: what the kits share, on AMD's GPUs. In a torch that is built for ROCm they are called "cuda", their
graphs are HIP's, and the transport "nccl" is RCCL."""

from __future__ import annotations

import torch

from lineshaft_contract.backends import World
from lineshaft_rocm import aiter_ops
from lineshaft_rocm.options import RocmOptions
from lineshaft_torch.bound import Recipe
from lineshaft_torch.fake import FakeDevice
from lineshaft_triton.backend import GpuBackend, library_linear
from lineshaft_triton.interpreting import require_mode
from lineshaft_triton.starting import device_number, require_build, start_device
from lineshaft_triton.targets import TARGETS, Target, find_target


def libraries(target: Target) -> list[tuple[Recipe, str]]:
    """Kernels of AMD's libraries, each with the module that it needs ("": torch)."""
    return [(library_linear("hipblas_linear"), ""), *((each, aiter_ops.PACKAGE) for each in aiter_ops.recipes(target))]


def create(options: RocmOptions, world: World) -> GpuBackend:
    """The factory that the plugin registers. Raises BackendUnavailable without a GPU that torch can start or in a torch
    that is not built for ROCm, LayoutError for fewer GPUs than ranks, InvalidValue for a GPU without kernels."""
    require_mode(options.interpret)
    if options.interpret:
        return GpuBackend("rocm", options, world, TARGETS[options.target], FakeDevice(), libraries)
    require_build("rocm", lambda: torch.version.hip, "ROCm")
    number = device_number("rocm", options, world)
    target = find_target(torch.cuda.get_device_properties(number).gcnArchName, "amd")
    return GpuBackend("rocm", options, world, target, start_device(number), libraries)
