"""The options of the TPU backend, as a user may write them under `backend_options`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TpuOptions(BaseModel):
    """How the TPU backend runs.

    platform              "tpu", or "cpu" to run the whole engine on JAX's CPU platform, on virtual devices
    interpret             on the CPU platform: the Pallas kernels take part too, in JAX's interpreter (slow, for checks)
    detect_races          with interpret: raise where two accesses of a kernel race; such programs are not kept
    chip                  the chip whose tiling rules hold where there is none: under interpret
    attention_memory_mib  largest temporaries, in MiB, of one call of the attention without Pallas
    cache_dir             folder of compiled programs; "auto": lineshaft/programs in the user's cache, "off": none
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    platform: Literal["tpu", "cpu"] = "tpu"
    interpret: bool = False
    detect_races: bool = False
    chip: Literal["v4", "v5e", "v5p", "v6e", "tpu7x"] = "v5e"
    attention_memory_mib: int = Field(default=256, ge=1)
    cache_dir: str = Field(default="auto", min_length=1)

    @model_validator(mode="after")
    def _fit(self) -> TpuOptions:
        if self.interpret and self.platform != "cpu":
            raise ValueError('interpret = true needs platform = "cpu": on a TPU kernels are compiled')
        if self.detect_races and not self.interpret:
            raise ValueError("detect_races = true needs interpret = true: only the interpreter sees races")
        return self
