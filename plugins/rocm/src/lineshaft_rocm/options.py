"""The options of the rocm backend, as a user may write them under `backend_options`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RocmOptions(BaseModel):
    """How the rocm backend runs.

    interpret             without a GPU: the kernels run in Triton's interpreter, on the host (slow, for checks)
    target                under interpret: the GPU for which kernels choose their tiles
    attention_memory_mib  largest temporaries, in MiB, of one call of the portable attention
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    interpret: bool = False
    target: Literal["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"] = "gfx942"
    attention_memory_mib: int = Field(default=256, ge=1)
