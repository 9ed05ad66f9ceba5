"""Tiles of the matrix products, as tables: for each kind of operands and each target, one row of tiles.

Chosen so that the tiles reach the target's matrix instructions, fit its shared memory and spill no register; what is
fastest among them is for a plan to measure on a device. Knows no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.launch import Config
from lineshaft_triton.targets import CORES, FN, FNUZ, Target

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
NAMES: Final = tuple(tier.name for tier in TIERS)
CODE_TIERS: Final = (TIERS[0], TIERS[1], Tier("many", 65, MANY))
"""Tiers of quantized weights, and of products per head."""
EXPERT_TIERS: Final = CODE_TIERS
"""Tiers of grouped products, by the rows that an expert has on average."""

INTERPRETED: Final = (
    (16, 128, 128, 4, 1), (32, 64, 128, 4, 1), (128, 64, 128, 4, 1), (256, 64, 64, 4, 1), (256, 64, 128, 4, 1),
    (64, 128, 128, 4, 1),
)  # fmt: skip
"""Tiles for the interpreter, which is slow by the program, and much less by the size of a tile."""

HALF_TILES: Final = MappingProxyType(
    {
        "sm80": ((16, 32, 128, 4, 5), (64, 32, 128, 4, 4), (128, 128, 32, 4, 4), (128, 256, 32, 8, 3),
                 (256, 128, 32, 8, 3), (128, 128, 64, 8, 3)),
        "sm89": ((16, 32, 128, 4, 4), (64, 32, 128, 4, 3), (128, 128, 32, 4, 3), (128, 256, 32, 8, 3),
                 (256, 128, 32, 8, 3), (128, 128, 64, 8, 3)),
        "sm90": ((16, 32, 128, 4, 5), (64, 32, 128, 4, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4),
                 (256, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
        "sm100": ((16, 32, 128, 4, 5), (64, 32, 128, 4, 4), (128, 128, 64, 4, 4), (128, 256, 64, 8, 4),
                  (256, 128, 64, 8, 4), (128, 128, 128, 4, 3)),
        "sm120": ((16, 32, 128, 4, 4), (64, 32, 128, 4, 3), (128, 128, 32, 4, 3), (128, 256, 32, 8, 3),
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


SINGLE_TILES: Final = MappingProxyType(
    {
        "sm80": ((16, 32, 64, 4, 3), (64, 32, 32, 8, 3), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "sm89": ((16, 32, 64, 4, 3), (64, 32, 32, 8, 3), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "sm90": ((16, 32, 64, 4, 3), (64, 32, 32, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "sm100": ((16, 32, 64, 4, 3), (64, 32, 32, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "sm120": ((16, 32, 64, 4, 3), (64, 32, 32, 8, 3), (128, 64, 16, 8, 3), (128, 64, 16, 8, 3)),
        "gfx90a": ((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "gfx942": ((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "gfx950": ((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 64, 16, 8, 2), (128, 64, 16, 8, 2)),
        "gfx1100": ((16, 32, 32, 4, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
        "gfx1201": ((16, 32, 32, 4, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2), (64, 64, 16, 8, 2)),
    }
)  # fmt: skip
"""x of 32 bits, whatever the weights are: products are exact, on the vector units (mfma of float32 on CDNA)."""

CODES_TILES: Final = MappingProxyType(
    {
        "sm80": ((16, 32, 256, 4, 4), (64, 64, 128, 4, 3), (128, 128, 64, 8, 3)),
        "sm89": ((16, 32, 256, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "sm90": ((16, 32, 256, 4, 4), (64, 32, 128, 4, 4), (128, 128, 64, 8, 4)),
        "sm100": ((16, 32, 256, 4, 4), (64, 32, 128, 4, 4), (128, 128, 64, 8, 4)),
        "sm120": ((16, 32, 256, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "gfx90a": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx942": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx950": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx1100": ((16, 32, 128, 4, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2)),
        "gfx1201": ((16, 32, 128, 4, 2), (64, 64, 64, 4, 2), (128, 64, 64, 8, 2)),
    }
)  # fmt: skip
"""x of 16 bits and weights in codes of 8 bits, which are widened in registers."""

FOUR_TILES: Final = MappingProxyType(
    {
        "sm80": ((16, 32, 128, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "sm89": ((16, 32, 128, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "sm90": ((16, 32, 128, 4, 4), (64, 32, 128, 4, 4), (128, 64, 64, 8, 4)),
        "sm100": ((16, 32, 128, 4, 4), (64, 32, 64, 4, 4), (128, 64, 64, 8, 4)),
        "sm120": ((16, 32, 128, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
        "gfx90a": ((16, 32, 128, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx942": ((16, 32, 128, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx950": ((16, 32, 128, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx1100": ((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2)),
        "gfx1201": ((16, 32, 128, 4, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2)),
    }
)  # fmt: skip
"""x of 16 bits and weights in codes of 4 bits. A step takes no more terms than a group has."""

INT8_TILES: Final = MappingProxyType(
    {
        "sm80": ((16, 32, 256, 4, 4), (64, 64, 128, 4, 4), (128, 128, 64, 8, 4)),
        "sm89": ((16, 32, 256, 4, 4), (64, 64, 128, 4, 4), (128, 128, 64, 8, 4)),
        "sm90": ((16, 32, 256, 4, 4), (64, 32, 128, 4, 4), (128, 128, 128, 8, 4)),
        "sm100": ((16, 32, 256, 4, 4), (64, 32, 128, 4, 4), (128, 128, 128, 8, 4)),
        "sm120": ((16, 32, 256, 4, 4), (64, 64, 128, 4, 4), (128, 128, 64, 8, 4)),
        "gfx90a": ((16, 32, 256, 4, 2), (64, 64, 128, 4, 2), (128, 128, 64, 8, 2)),
        "gfx942": ((16, 32, 256, 4, 2), (64, 64, 128, 4, 2), (128, 128, 128, 8, 2)),
        "gfx950": ((16, 32, 256, 4, 2), (64, 64, 128, 4, 2), (128, 128, 128, 8, 2)),
        "gfx1100": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
        "gfx1201": ((16, 32, 256, 4, 2), (64, 64, 64, 4, 2), (128, 128, 64, 8, 2)),
    }
)  # fmt: skip
"""Both operands in int8 codes."""

FP8_TILES: Final = MappingProxyType(
    {
        "sm89": INT8_TILES["sm89"],
        "sm90": ((64, 32, 128, 4, 4), (64, 32, 128, 4, 4), (128, 128, 128, 8, 4)),
        "sm100": ((64, 32, 128, 4, 4), (64, 32, 128, 4, 4), (128, 128, 128, 8, 4)),
        "sm120": INT8_TILES["sm120"],
        "gfx942": INT8_TILES["gfx942"],
        "gfx950": INT8_TILES["gfx950"],
        "gfx1201": INT8_TILES["gfx1201"],
    }
)  # fmt: skip
"""Both operands in fp8 codes. Where groups of warps multiply them, single warps have no instruction for them: tiles of
fewer than 64 rows would be multiplied as float16."""

GATED_TILES: Final = MappingProxyType(
    {
        "sm80": ((16, 16, 128, 4, 5), (64, 32, 64, 4, 4), (128, 32, 64, 4, 4)),
        "sm89": ((16, 16, 128, 4, 4), (64, 32, 64, 4, 4), (128, 32, 64, 4, 3)),
        "sm90": ((16, 16, 128, 4, 5), (64, 32, 128, 4, 4), (128, 64, 64, 8, 4)),
        "sm100": ((16, 16, 128, 4, 5), (64, 32, 128, 4, 4), (128, 64, 64, 8, 4)),
        "sm120": ((16, 16, 128, 4, 4), (64, 32, 64, 4, 4), (128, 32, 64, 4, 3)),
        "gfx90a": ((16, 16, 128, 4, 2), (64, 32, 64, 4, 2), (128, 64, 32, 4, 2)),
        "gfx942": ((16, 16, 128, 4, 2), (64, 32, 64, 4, 2), (128, 64, 64, 4, 2)),
        "gfx950": ((16, 16, 128, 4, 2), (64, 32, 64, 4, 2), (128, 64, 64, 4, 2)),
        "gfx1100": ((16, 16, 128, 4, 2), (64, 32, 32, 4, 2), (64, 64, 32, 8, 2)),
        "gfx1201": ((16, 16, 128, 4, 2), (64, 32, 32, 4, 2), (64, 64, 32, 8, 2)),
    }
)  # fmt: skip
"""As HALF_TILES, with two products of one x: rows are those of the plain product after them."""

GATED_SINGLE_TILES: Final = MappingProxyType(
    {
        "sm80": ((16, 16, 64, 4, 3), (64, 32, 16, 8, 3), (128, 32, 16, 8, 3)),
        "sm89": ((16, 16, 64, 4, 3), (64, 32, 16, 8, 3), (128, 32, 16, 8, 3)),
        "sm90": ((16, 16, 64, 4, 3), (64, 32, 16, 8, 3), (128, 32, 16, 8, 3)),
        "sm100": ((16, 16, 64, 4, 3), (64, 32, 16, 8, 3), (128, 32, 16, 8, 3)),
        "sm120": ((16, 16, 64, 4, 3), (64, 32, 16, 8, 3), (128, 32, 16, 8, 3)),
        "gfx90a": ((16, 16, 64, 4, 2), (64, 32, 32, 4, 2), (128, 32, 16, 8, 2)),
        "gfx942": ((16, 16, 64, 4, 2), (64, 32, 32, 4, 2), (128, 32, 16, 8, 2)),
        "gfx950": ((16, 16, 64, 4, 2), (64, 32, 32, 4, 2), (128, 32, 16, 8, 2)),
        "gfx1100": ((16, 16, 32, 4, 2), (64, 32, 16, 8, 2), (64, 32, 16, 8, 2)),
        "gfx1201": ((16, 16, 32, 4, 2), (64, 32, 16, 8, 2), (64, 32, 16, 8, 2)),
    }
)  # fmt: skip
"""The same of 32 bits."""


def _everywhere(*tiles: Tile) -> Mapping[str, tuple[Tile, ...]]:
    return MappingProxyType(dict.fromkeys(HALF_TILES, tiles))


HALF: Final = "half"
TABLES: Final[Mapping[str, Mapping[str, tuple[Tile, ...]]]] = MappingProxyType(
    {
        HALF: HALF_TILES, "single": SINGLE_TILES, "codes": CODES_TILES, "four": FOUR_TILES, "int8": INT8_TILES,
        "fp8": FP8_TILES, "gated_half": GATED_TILES, "gated_single": GATED_SINGLE_TILES,
        "ragged": _everywhere((16, 32, 64, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
        "ragged_single": _everywhere((16, 32, 32, 4, 2), (64, 32, 16, 8, 2), (64, 32, 16, 8, 2), (64, 32, 16, 8, 2)),
        "ragged_fp8": _everywhere((64, 32, 64, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
        "gated_ragged": _everywhere((16, 16, 64, 4, 2), (64, 32, 32, 4, 2), (64, 32, 32, 4, 2)),
        "gated_ragged_single": _everywhere((16, 16, 32, 4, 2), (64, 16, 16, 8, 2), (64, 16, 16, 8, 2)),
    }
)  # fmt: skip
"""Tiles by kind of operands. Those of ragged ones are for rows that do not all begin at a whole vector, whose numbers
are read one by one."""


RAGGED: Final = MappingProxyType({"single": "ragged_single", "fp8": "ragged_fp8"})


def table_of(dtype: str, even: bool) -> str:
    """The kind of operands of a dtype, whose rows all begin at a whole vector or do not."""
    kind = {"float32": "single", "int8": "int8", FN: "fp8", FNUZ: "fp8"}.get(dtype, HALF)
    return kind if even else RAGGED.get(kind, "ragged")


FEWEST_TERMS: Final = 32
"""Codes that a step takes at least."""
GROUP: Final = 8
"""Rows of tiles that are walked together, by the column."""
NARROW: Final = "mma"
"""What multiplies tiles of fewer rows than the instructions of a warp group, which take 64 at a time."""
GROUP_ROWS: Final = 64
MFMA_ROWS: Final = 16
"""Rows of the matrix instruction on CDNA: "MI300X workload optimization" of the ROCm documentation has the smaller
one as the faster one."""
PARTS: Final = 8
"""Parts at most that the terms of a sum are split into."""
STEPS: Final = 4
"""Steps at least that each part takes, so that its loads overlap."""


def config(where: Target, kind: str, tier: Tier, group_size: int = 0) -> Config:
    """The configuration of a tier, by its place among a table's tiles; a step takes a part of a group."""
    tiles = INTERPRETED if interpreting() else TABLES[kind][where.name]
    rows, cols, terms, warps, stages = tiles[NAMES.index(tier.name)]
    extra: dict[str, Any] = {"matrix_instr_nonkdim": MFMA_ROWS} if where.unit == "mfma" else {}
    unit = NARROW if where.unit in ("wgmma", "tcgen05") and rows < GROUP_ROWS else ""
    terms = math.gcd(terms, group_size) if group_size else terms
    return Config(
        {"BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": terms, "GROUP": GROUP}, warps, stages, extra, unit, tier.default
    )


def parts(where: Target, tiles: int, k: int, chosen: Config) -> int:
    """Into how many parts sums of k terms are split, for `tiles` tiles to fill the device twice: 1, 2, 4 or 8."""
    wanted, least, found = 2 * CORES[where.name], STEPS * chosen.block["BLOCK_K"], 1
    while found < PARTS and 2 * found * tiles <= wanted and k >= 2 * found * least:
        found *= 2
    return found
