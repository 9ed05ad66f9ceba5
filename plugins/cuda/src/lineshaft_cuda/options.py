"""The options of the cuda backend, as a user may write them under `backend_options`."""

from __future__ import annotations

from typing import Literal

from lineshaft_triton.options import GpuOptions


class CudaOptions(GpuOptions):
    """How the cuda backend runs."""

    target: Literal["sm80", "sm89", "sm90", "sm100", "sm120"] = "sm90"
    """Under `interpret`: the GPU for which kernels choose their tiles."""
