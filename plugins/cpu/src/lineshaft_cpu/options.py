"""The options of the CPU backend, as a user may write them under `backend_options`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CpuOptions(BaseModel):
    """How the CPU backend runs; the number of threads is the engine's `threads`.

    engine                "native" runs tapes of C kernels on threads of its own, "torch" PyTorch's; "auto" takes
                          "native" where the compiled kernels are and a worker is alone
    program               of the engine "torch": "tape" replays what was recorded before the first step, "eager" runs
                          the forward each step
    functional            of the engine "torch": keys and values are written into a copy of the cache: slow, for
                          finding forwards that drop it
    attention_memory_mib  of the engine "torch": largest temporaries, in MiB, of one call of the portable attention
    native                compiled kernels: "auto" takes the best level that was built and runs here, "off" none
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["auto", "native", "torch"] = "auto"
    program: Literal["tape", "eager"] = "tape"
    functional: bool = False
    attention_memory_mib: int = Field(default=256, ge=1)
    native: Literal["auto", "off", "amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated"] = "auto"
