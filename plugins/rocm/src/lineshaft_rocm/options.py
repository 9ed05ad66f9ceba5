"""The options of the rocm backend, as a user may write them under `backend_options`."""

from __future__ import annotations

from typing import Literal

from lineshaft_triton.options import GpuOptions


class RocmOptions(GpuOptions):
    """How the rocm backend runs."""

    target: Literal["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"] = "gfx942"
    """Under `interpret`: the GPU for which kernels choose their tiles."""
