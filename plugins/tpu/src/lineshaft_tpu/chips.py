"""TPU generations: their memory, and how a topology is written. Knows nothing of JAX."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lineshaft_contract.errors import InvalidValue

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Chip:
    """One generation. Memories are in bytes.

    pod      the most chips that one torus has
    hbm      of a device, as much as programs may use by its compiler's count
    vmem     of a core, beside the matrix unit; smem: of a core, for scalars
    dims     of the torus
    devices  that JAX shows for each chip
    kind     the name that JAX gives such a device
    cores    that one program runs on together
    """

    name: str
    kind: str
    pod: int
    hbm: int
    vmem: int
    dims: int
    devices: int = 1
    cores: int = 1
    smem: int = MIB


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", pod=4096, hbm=int(15.25 * GIB), vmem=16 * MIB, dims=3, devices=2),
        Chip("v5e", "TPU v5 lite", pod=256, hbm=int(15.75 * GIB), vmem=128 * MIB, dims=2),
        Chip("v5p", "TPU v5", pod=8960, hbm=int(95.74 * GIB), vmem=64 * MIB, dims=3, cores=2),
        Chip("v6e", "TPU v6 lite", pod=256, hbm=int(31.25 * GIB), vmem=128 * MIB, dims=2),
        Chip("tpu7x", "TPU7x", pod=9216, hbm=int(94.75 * GIB), vmem=64 * MIB, dims=3, devices=2),
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


SLICES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)),
}
"""Shapes that machines come in, by the dims of the torus, smallest first."""


def smallest(chip: Chip, devices: int) -> Topology:
    """The smallest topology with so many devices; the largest known where none has."""
    found = [Topology(chip, shape) for shape in SLICES[chip.dims]]
    return next((topology for topology in found if topology.devices >= devices), found[-1])


def parse_topology(text: str, devices: int = 1) -> Topology:
    """A topology by name; a generation alone stands for its smallest with `devices` devices. Raises InvalidValue."""
    name, _, sizes = text.partition(":")
    known = ", ".join(CHIPS)
    if name not in CHIPS:
        raise InvalidValue(f"topology {text!r}: no generation {name!r}; known are {known}, written like v5e:2x4")
    chip = CHIPS[name]
    if ":" not in text:
        return smallest(chip, devices)
    example = "x".join(["2", "4"] if chip.dims == 2 else ["2", "2", "1"])
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", sizes) or sizes.count("x") + 1 != chip.dims:
        raise InvalidValue(f"topology {text!r}: chips of {name} lie in {chip.dims} dims, written like {name}:{example}")
    shape = tuple(map(int, sizes.split("x")))
    if math.prod(shape) > chip.pod:
        raise InvalidValue(
            f"topology {text!r}: {math.prod(shape)} chips, {name} has at most {chip.pod}; name a smaller one"
        )
    return Topology(chip, shape)


def chip_of_kind(kind: str) -> Chip:
    """The generation of a device by the name that JAX gives it. Raises InvalidValue for one that is not known."""
    for chip in CHIPS.values():
        if chip.kind == kind:
            return chip
    raise InvalidValue(f"the TPU {kind!r} is none of {', '.join(chip.kind for chip in CHIPS.values())}")
