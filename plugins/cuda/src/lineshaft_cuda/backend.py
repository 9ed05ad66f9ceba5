"""The cuda backend: what the kits share, on NVIDIA's GPUs, with the libraries that are installed beside."""

from __future__ import annotations

import torch

from lineshaft_contract.backends import World
from lineshaft_cuda import flash_attend, flashinfer_attend
from lineshaft_cuda.options import CudaOptions
from lineshaft_torch.bound import Recipe
from lineshaft_torch.fake import FakeDevice
from lineshaft_triton.backend import GpuBackend, library_linear
from lineshaft_triton.interpreting import require_mode
from lineshaft_triton.starting import device_number, require_build, start_device
from lineshaft_triton.targets import TARGETS, Target, find_target


def libraries(target: Target) -> list[tuple[Recipe, str]]:
    """Kernels of NVIDIA's libraries and of packages, each with the module that it needs ("": torch)."""
    return [
        (library_linear("cublas_linear"), ""),
        *flash_attend.recipes(target),
        *((each, flashinfer_attend.PACKAGE) for each in flashinfer_attend.recipes()),
    ]


def create(options: CudaOptions, world: World) -> GpuBackend:
    """The factory that the plugin registers. Raises BackendUnavailable without a GPU that torch can start, LayoutError
    for fewer GPUs than ranks, InvalidValue for a GPU that there are no kernels for."""
    require_mode(options.interpret)
    if options.interpret:
        return GpuBackend("cuda", options, world, TARGETS[options.target], FakeDevice(), libraries)
    require_build("cuda", lambda: torch.version.cuda, "CUDA")
    number = device_number("cuda", options, world)
    major, minor = torch.cuda.get_device_capability(number)
    target = find_target(f"sm{major}{minor}", "nvidia")
    return GpuBackend("cuda", options, world, target, start_device(number), libraries)
