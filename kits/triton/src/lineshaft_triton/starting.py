"""Which GPU a rank runs on, and what keeps it from starting. Asks torch, which knows AMD's GPUs by the same names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lineshaft_contract.backends import World
from lineshaft_contract.errors import BackendUnavailable, LayoutError
from lineshaft_torch.device import TorchDevice
from lineshaft_triton.options import GpuOptions
from lineshaft_triton.probing import INSTEAD


def device_number(backend: str, options: GpuOptions, world: World) -> int:
    """The number of the GPU that this rank takes, among those visible.

    Raises BackendUnavailable where torch cannot start them, LayoutError where there are fewer than ranks.
    """
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:  # torch says the second where it is built without a device
        text = " ".join(str(error).split())
        raise BackendUnavailable(f"torch cannot start the GPU ({text:.300}); {INSTEAD.format(backend)}") from error
    absent = [number for number in options.devices if number >= count]
    if absent:
        raise LayoutError(f"devices names GPU {absent[0]}; {count} are visible, numbered from 0")
    chosen = options.devices or tuple(range(count))
    if len(chosen) < world.size:
        which = f"devices names {len(chosen)}" if options.devices else f"{count} are visible"
        raise LayoutError(f"the layout has {world.size} ranks, one on a GPU each, and {which}; lower a degree")
    return chosen[world.rank]


def start_device(number: int) -> TorchDevice:
    """The GPU of that number. From then on this process makes products of matrices as the contract wants them: sums in
    float32, rounded once."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return TorchDevice(number)


def require_build(backend: str, built: Callable[[], str | None], name: str) -> None:
    """Raises BackendUnavailable where torch is not built for the backend's GPUs."""
    if not built():
        raise BackendUnavailable(
            f"torch {torch.__version__} is built without {name}; install its build for {name}, or "
            f"{INSTEAD.format(backend)}"
        )
