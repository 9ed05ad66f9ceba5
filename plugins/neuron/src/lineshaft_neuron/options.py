"""The options of the Neuron backend, as a user may write them under `backend_options`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Sizes = tuple[Annotated[int, Field(ge=1)], ...]


class NeuronOptions(BaseModel):
    """How the Neuron backend runs.

    lane             "compile": torch.compile on the device "neuron"; "trace": torch_neuronx.trace, for torch-neuronx
                     before 2.10; "auto": the one that the installed version has
    stand_in         run on a strict imitation of the device on the CPU, for checks: the evidence is *interpreted*
    prefill_buckets  lengths, in tokens, that a prefill is padded to; the longest is how much of a prompt a step takes
    decode_buckets   numbers of sequences that a decode step is padded to
    compiler_flags   for the vendor's compiler, put before those of NEURON_CC_FLAGS
    cache_dir        folder of compiled programs; "auto": lineshaft/neuron in the user's cache, "off": none
    attention_memory_mib  largest temporaries, in MiB, of one call of attention, which works in blocks to keep within
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lane: Literal["auto", "compile", "trace"] = "auto"
    stand_in: bool = False
    prefill_buckets: Sizes = (128, 256, 512, 1024, 2048, 4096)
    decode_buckets: Sizes = (1, 2, 4, 8, 16, 32, 64)
    compiler_flags: str = ""
    cache_dir: str = Field(default="auto", min_length=1)
    attention_memory_mib: int = Field(default=1024, ge=1)

    @field_validator("prefill_buckets", "decode_buckets", mode="before")
    @classmethod
    def _listed(cls, sizes: object) -> object:
        """A table may come as text, from the command line or the environment: "128,256"."""
        listed = sizes.split(",") if isinstance(sizes, str) else sizes
        if not isinstance(listed, list | tuple) or not listed:
            raise ValueError("it should be a list of one whole number or more: [1, 2, 4], or as text 1,2,4")
        return listed

    @field_validator("prefill_buckets", "decode_buckets")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes)):
            raise ValueError(
                f"buckets have to ascend, each once, for example {sorted(set(sizes))}; given {list(sizes)}"
            )
        return sizes

    @model_validator(mode="after")
    def _fit(self) -> NeuronOptions:
        if self.stand_in and self.lane == "trace":
            raise ValueError('stand_in = true imitates the lane "compile" alone; set lane = "auto" or "compile"')
        return self
