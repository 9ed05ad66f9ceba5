"""The options that backends of NVIDIA and AMD GPUs share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class GpuOptions(BaseModel):
    """How a GPU backend runs; a plugin adds its `target`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    interpret: bool = False
    """Without a GPU: the kernels run in Triton's interpreter, on the host, and programs on a device of fakes (slow, for
    checks)."""
    program: Literal["graph", "piecewise", "tape", "eager"] = "graph"
    """How a step runs: "graph" replays a decode step as one graph and others piecewise, attention between the pieces;
    "piecewise" does so with all; "tape" replays recorded calls; "eager" runs the forward each step."""
    overlap_communication: bool = False
    """Whether collectives run on a stream of their own, beside what does not need their results."""
    devices: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The GPUs that ranks take, in their order, by number among those visible; empty: the first ones."""
    attention_memory_mib: int = Field(default=256, ge=1)
    """Largest temporaries, in MiB, of one call of the portable attention, which serves where no kernel does."""

    @field_validator("devices", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Text, as variables and the command line have it: "0,1" or "[0, 1]"."""
        return [part for part in value.strip(" []").split(",") if part.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fit(self) -> GpuOptions:
        if self.overlap_communication and self.program == "eager":
            raise ValueError('overlap_communication = true needs recorded calls; with program = "eager" there are none')
        if len(set(self.devices)) < len(self.devices):
            raise ValueError("devices names a GPU twice; each rank needs one of its own")
        if self.interpret and self.devices:
            raise ValueError("devices are those of GPUs; with interpret = true there are none")
        if "target" in self.model_fields_set and not self.interpret:
            raise ValueError("target is for interpret = true; without it, the GPU that is there is the target")
        return self
