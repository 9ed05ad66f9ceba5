"""Tiles of the matrix products, as tables: for each kind of operands and each target, one row of tiles.

Chosen so that the tiles reach the target's matrix instructions, fit its shared memory and spill no register; what is
fastest among them is for a plan to measure on a device. Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.launch import Config
from lineshaft_triton.targets import Target

Tile = tuple[int, ...]
"""(rows of x, rows of the weight, terms of the sums, warps, stages)"""


@dataclass(frozen=True)
class Tier:
    """A tile's part of the problems: those of `first` to `last` rows. Alternates are no plan's choice unasked."""

    name: str
    first: int
    last: int
    default: bool = True

    def reason(self, rows: int) -> str | None:
        """None, or why a product of `rows` rows is not this tier's."""
        if self.first <= rows <= self.last:
            return None
        return f"its tile is for {self.first} rows" + (f" to {self.last}" if self.last < MANY else " and more")


MANY: Final = 1 << 31
TIERS: Final = (
    Tier("few", 0, 16), Tier("some", 17, 64), Tier("many", 65, 1023), Tier("bulk", 1024, MANY),
    Tier("tall", 65, MANY, default=False), Tier("wide", 65, MANY, default=False),
)  # fmt: skip
"""Tiers of dense weights, in the order of a table's tiles."""
CODE_TIERS: Final = (Tier("few", 0, 16), Tier("some", 17, 64), Tier("many", 65, MANY))
"""Tiers of quantized weights."""

INTERPRETED: Final = "interpreter"
"""The row of a table for the interpreter, which is slow by the program and not by the size of a tile."""
INTERPRETED_TILES: Final = (
    (16, 128, 128, 4, 1), (32, 64, 128, 4, 1), (128, 64, 128, 4, 1), (256, 64, 64, 4, 1), (256, 64, 128, 4, 1),
    (64, 128, 128, 4, 1),
)  # fmt: skip

HALF: Final = MappingProxyType(
    {
        INTERPRETED: INTERPRETED_TILES,
        "sm80": ((16, 32, 128, 4, 5), (64, 64, 64, 4, 4), (128, 128, 32, 4, 4), (128, 256, 32, 8, 3),
                 (256, 128, 32, 8, 3), (128, 128, 64, 8, 3)),
        "sm89": ((16, 32, 128, 4, 4), (64, 64, 64, 4, 4), (128, 128, 32, 4, 3), (128, 256, 32, 8, 3),
                 (256, 128, 32, 8, 3), (128, 128, 64, 8, 3)),
        "sm90": ((16, 32, 128, 4, 5), (64, 64, 128, 4, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4),
                 (256, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
        "sm100": ((16, 32, 128, 4, 5), (64, 64, 128, 4, 4), (128, 128, 64, 4, 4), (128, 256, 64, 8, 4),
                  (256, 128, 64, 8, 4), (128, 256, 64, 4, 3)),
        "sm120": ((16, 32, 128, 4, 4), (64, 64, 64, 4, 4), (128, 128, 32, 4, 3), (128, 256, 32, 8, 3),
                  (256, 128, 32, 8, 3), (128, 128, 64, 8, 3)),
        "gfx90a": ((16, 32, 128, 4, 2), (64, 64, 64, 4, 2), (128, 128, 32, 4, 2), (256, 128, 32, 8, 2),
                   (256, 256, 32, 8, 2), (128, 128, 64, 8, 2)),
        "gfx942": ((16, 32, 128, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 4, 2), (256, 256, 32, 8, 2),
                   (256, 128, 64, 8, 2), (128, 256, 64, 8, 2)),
        "gfx950": ((16, 32, 128, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 4, 2), (256, 256, 32, 8, 2),
                   (256, 128, 64, 8, 2), (128, 256, 64, 8, 2)),
        "gfx1100": ((16, 32, 128, 4, 2), (64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (128, 128, 32, 8, 2),
                    (128, 64, 32, 8, 2), (128, 64, 32, 4, 2)),
        "gfx1201": ((16, 32, 128, 4, 2), (64, 64, 32, 4, 2), (64, 128, 32, 8, 2), (128, 128, 32, 8, 2),
                    (128, 64, 32, 8, 2), (128, 64, 32, 4, 2)),
    }
)  # fmt: skip
"""x and weights of 16 bits. The memory sets the pace of the first two tiers, the instructions that of the others."""


SINGLE: Final = MappingProxyType(
    {
        INTERPRETED: INTERPRETED_TILES,
        "sm80": ((16, 32, 64, 4, 3), (64, 64, 16, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "sm89": ((16, 32, 64, 4, 3), (64, 64, 16, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "sm90": ((16, 32, 64, 4, 3), (64, 64, 16, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "sm100": ((16, 32, 64, 4, 3), (64, 64, 16, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "sm120": ((16, 32, 64, 4, 3), (64, 64, 16, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "gfx90a": ((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "gfx942": ((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "gfx950": ((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "gfx1100": ((16, 32, 32, 4, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
        "gfx1201": ((16, 32, 32, 4, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
    }
)  # fmt: skip
"""x of 32 bits, whatever the weights are: products are exact, on the vector units (mfma of float32 on CDNA)."""

CODES: Final = MappingProxyType(
    {
        INTERPRETED: INTERPRETED_TILES,
        "sm80": ((16, 32, 256, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "sm89": ((16, 32, 256, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "sm90": ((16, 32, 256, 4, 4), (64, 64, 128, 4, 4), (128, 128, 64, 8, 4)),
        "sm100": ((16, 32, 256, 4, 4), (64, 64, 128, 4, 4), (128, 128, 64, 8, 4)),
        "sm120": ((16, 32, 256, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "gfx90a": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx942": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx950": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx1100": ((16, 32, 128, 4, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2)),
        "gfx1201": ((16, 32, 128, 4, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2)),
    }
)  # fmt: skip
"""x of 16 bits and weights in codes of 8 bits, which are widened in registers."""

TABLES: Final[Mapping[str, Mapping[str, tuple[Tile, ...]]]] = MappingProxyType(
    {"half": HALF, "single": SINGLE, "codes": CODES}
)
GROUP: Final = 8
"""Rows of tiles that are walked together, by the column."""
NARROW: Final = "mma"
"""What multiplies tiles of fewer rows than the instructions of a warp group, which take 64 at a time."""
GROUP_ROWS: Final = 64
MFMA_ROWS: Final = 16
"""Rows of the matrix instruction on CDNA: "MI300X workload optimization" of the ROCm documentation has the smaller
one as the faster one."""
CORES: Final = MappingProxyType(
    {"sm80": 108, "sm89": 142, "sm90": 132, "sm100": 148, "sm120": 188, "gfx90a": 110, "gfx942": 304, "gfx950": 256,
     "gfx1100": 96, "gfx1201": 64}
)  # fmt: skip
"""Multiprocessors (compute units) of the largest device of each target."""
PARTS: Final = 8
"""Parts at most that the terms of a sum are split into."""
STEPS: Final = 4
"""Steps at least that each part takes, so that its loads overlap."""


def config(where: Target, kind: str, tier: Tier, index: int) -> Config:
    """The configuration of a tier, by its place among a table's tiles."""
    rows, cols, terms, warps, stages = TABLES[kind][INTERPRETED if interpreting() else where.name][index]
    extra: dict[str, Any] = {"matrix_instr_nonkdim": MFMA_ROWS} if where.unit == "mfma" else {}
    unit = NARROW if where.unit in ("wgmma", "tcgen05") and rows < GROUP_ROWS else ""
    block = {"BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": terms, "GROUP": GROUP}
    return Config(block, warps, stages, extra, unit, tier.default)


def parts(where: Target, tiles: int, k: int, chosen: Config) -> int:
    """Into how many parts sums of k terms are split, for `tiles` tiles to fill the device twice: 1, 2, 4 or 8."""
    found = 1
    while (
        found < PARTS
        and 2 * found * tiles <= 2 * CORES[where.name]
        and k >= 2 * found * STEPS * chosen.block["BLOCK_K"]
    ):
        found *= 2
    return found
