"""TPU generations: their memory, and how a topology is written. Knows nothing of JAX."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lineshaft.errors import InvalidValue

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One generation.

    hbm      bytes of a device that programs may use, as its compiler counts them
    dims     of the torus
    devices  that JAX shows for each chip
    kind     the name that JAX gives such a device
    """

    name: str
    hbm: int
    dims: int
    devices: int
    kind: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 2, 1, "TPU v5 lite"),
        Chip("v5p", int(95.74 * GIB), 3, 1, "TPU v5"),
        Chip("v6e", int(31.25 * GIB), 2, 1, "TPU v6 lite"),
        Chip("tpu7x", int(94.75 * GIB), 3, 2, "TPU7x"),
    )
}


@dataclass(frozen=True)
class Topology:
    """Chips of one generation in a torus: "v5e:2x4", "v5p:2x2x1"."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices


def parse_topology(text: str) -> Topology:
    """A topology by name; a generation alone stands for one chip. Raises InvalidValue."""
    name, _, sizes = text.partition(":")
    known = ", ".join(CHIPS)
    if name not in CHIPS:
        raise InvalidValue(f"topology {text!r}: no generation {name!r}; known are {known}, written like v5e:2x4")
    chip = CHIPS[name]
    if not sizes and ":" not in text:
        return Topology(chip, (1,) * chip.dims)
    example = "x".join(["2", "4"] if chip.dims == 2 else ["2", "2", "1"])
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", sizes) or sizes.count("x") + 1 != chip.dims:
        raise InvalidValue(f"topology {text!r}: chips of {name} lie in {chip.dims} dims, written like {name}:{example}")
    return Topology(chip, tuple(map(int, sizes.split("x"))))


def chip_of_kind(kind: str) -> Chip:
    """The generation of a device by the name that JAX gives it. Raises InvalidValue for one that is not known."""
    for chip in CHIPS.values():
        if chip.kind == kind:
            return chip
    raise InvalidValue(f"the TPU {kind!r} is none of {', '.join(chip.kind for chip in CHIPS.values())}")
