"""The options of the Neuron backend, as a user may write them under `backend_options`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Size = Annotated[int, Field(ge=1, le=1 << 20)]


class NeuronOptions(BaseModel):
    """How the Neuron backend runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    lane: Literal["auto", "compile", "trace"] = "auto"
    """What compiles: "compile" is torch.compile on the device `neuron`, which torch-neuronx has from 2.10 on; "trace"
    is torch_neuronx.trace, for 2.9; "auto" takes the one that the installed version has."""
    stand_in: bool = False
    """Run on a strict imitation of the device, on the CPU of any machine (slow, for checks)."""
    prefill_buckets: tuple[Size, ...] = Field(default=(128, 256, 512, 1024, 2048, 4096), min_length=1)
    """Lengths in tokens, ascending, that a prefill is padded to; a longer prompt goes in chunks of the last."""
    decode_buckets: tuple[Size, ...] = Field(default=(1, 2, 4, 8, 16, 32, 64), min_length=1)
    """Numbers of sequences, ascending, that a decode step is padded to; the last is the largest batch."""
    compiler_flags: str = ""
    """Flags for the vendor's compiler, put before those of `NEURON_CC_FLAGS`."""
    cache_dir: str = Field(default="auto", min_length=1)
    """Folder of compiled programs; "auto": `lineshaft/neuron` in the user's cache folder, "off": none. A variable of
    the vendor's that names one wins."""
    attention_memory_mib: int = Field(default=1024, ge=1)
    """Largest temporaries, in MiB, of one call of attention, which works in blocks to keep within."""

    @field_validator("prefill_buckets", "decode_buckets", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A table may be text, as variables and the command line have it: "128,256" or "[128, 256]"."""
        if isinstance(value, str):
            value = value.strip(" []")
        listed = value.split(",") if isinstance(value, str) and value else value
        if not isinstance(listed, list | tuple) or not listed:
            raise ValueError("it should be a list of one whole number or more: [1, 2, 4], or as text 1,2,4")
        return listed

    @field_validator("prefill_buckets", "decode_buckets")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes)):
            raise ValueError(f"sizes have to ascend, each once: {sorted(set(sizes))}, not {list(sizes)}")
        return sizes

    @model_validator(mode="after")
    def _fit(self) -> NeuronOptions:
        if self.stand_in and self.lane == "trace":
            raise ValueError('stand_in = true imitates the lane "compile" alone; set lane = "auto" or "compile"')
        return self
