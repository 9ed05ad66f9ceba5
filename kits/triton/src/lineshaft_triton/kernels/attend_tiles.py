"""Tiles of the attention kernel on each target, as a table, and how many programs a target wants. Imports no Triton."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from lineshaft_contract.problems import AttendProblem, itemsize
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.launch import Config
from lineshaft_triton.targets import CORES, FN, FNUZ, TARGETS, Target

DECODE: Final = "decode"
FEW: Final = "few"
CHUNK: Final = "chunk"
KINDS: Final = MappingProxyType({DECODE: (DECODE, FEW), FEW: (FEW, DECODE), CHUNK: (CHUNK, FEW, DECODE)})
"""What a step's rows ask: one query, so few that they fill the rows of one small product, or any number. With whose
tiles each may take, those that suit it best first."""
MATRIX_ROWS: Final = 64
"""Rows from which the matrix instructions of large tiles, wgmma and tcgen05, are used; below them it is mma."""

WAVES: Final = 4
"""Programs for each multiprocessor up to which a context is split."""
MOST_SPLITS: Final = 256
INTERPRETED_N: Final = 64
"""Keys of a tile, at least, and (INTERPRETED_CORES) what stands for the number of multiprocessors in the interpreter,
where a tile costs the same whatever its size."""
INTERPRETED_CORES: Final = 4

_E5M2, _E5M2FNUZ = "float8_e5m2", "float8_e5m2fnuz"
_OCP, _BOTH = frozenset({FN, _E5M2}), frozenset({FN, _E5M2, FNUZ, _E5M2FNUZ})

NVIDIA: Final = ("sm80", "sm89", "sm90", "sm100", "sm120")
HOPPER: Final = ("sm90", "sm100")
"""Those whose large tiles have instructions of their own, which read operands from shared memory."""
CDNA: Final = ("gfx90a", "gfx942", "gfx950")
RDNA: Final = ("gfx1100", "gfx1201")
LATENT: Final = 576
"""Keys of multi-head latent attention, whose values are their first 512."""

Options = Mapping[str, Any]
ALL_REGISTERS: Final[Options] = MappingProxyType({"maxnreg": 255})
"""Without it the assembler spills a few registers to have another block on a multiprocessor."""
SMALL_PRODUCTS: Final[Options] = MappingProxyType({"matrix_instr_nonkdim": 16})
"""Products of 16 x 16: a thread then has fewer rows, and masks of fewer rows fit into the scalar registers."""
NONE: Final[Options] = MappingProxyType({})
Row = tuple[str, tuple[str, ...], int, int, int, int, int, int, Options]
_TABLE: Final[tuple[Row, ...]] = (
    # kind, targets, bytes of a value, heads up to, BLOCK_M, BLOCK_N, warps, stages, options of the compiler
    (DECODE, NVIDIA, 2, 128, 16, 64, 4, 3, ALL_REGISTERS),
    (DECODE, NVIDIA, 2, 256, 16, 32, 4, 3, ALL_REGISTERS),
    (DECODE, NVIDIA, 2, LATENT, 16, 32, 8, 2, ALL_REGISTERS),
    (DECODE, CDNA, 2, 256, 16, 32, 4, 2, NONE),
    (DECODE, CDNA, 2, LATENT, 16, 16, 8, 1, NONE),
    (DECODE, RDNA, 2, 64, 16, 32, 4, 2, NONE),
    (DECODE, RDNA, 2, 128, 16, 16, 4, 1, NONE),
    (DECODE, RDNA, 2, 256, 16, 16, 8, 1, NONE),
    (FEW, ("gfx90a",), 2, 64, 16, 32, 4, 1, NONE),
    (FEW, ("gfx942", "gfx950"), 2, 128, 16, 32, 4, 1, NONE),
    (FEW, CDNA, 2, 256, 16, 16, 4, 1, NONE),
    (FEW, RDNA, 2, 64, 16, 32, 4, 1, NONE),
    (CHUNK, HOPPER, 2, 128, 128, 64, 8, 3, ALL_REGISTERS),
    (CHUNK, HOPPER, 2, 256, 64, 32, 8, 2, ALL_REGISTERS),
    (CHUNK, NVIDIA, 2, 64, 128, 64, 8, 2, ALL_REGISTERS),
    (CHUNK, ("sm120",), 2, 128, 64, 64, 8, 2, ALL_REGISTERS),
    (CHUNK, NVIDIA, 2, 128, 128, 32, 8, 2, ALL_REGISTERS),
    (CHUNK, NVIDIA, 2, 256, 64, 16, 8, 2, ALL_REGISTERS),
    (CHUNK, CDNA, 2, 128, 128, 32, 8, 1, SMALL_PRODUCTS),
    (CHUNK, CDNA, 2, 256, 64, 32, 4, 1, SMALL_PRODUCTS),
    (CHUNK, RDNA, 2, 64, 128, 32, 8, 1, NONE),
    (CHUNK, ("gfx1100",), 2, 128, 128, 16, 8, 1, NONE),
    (CHUNK, ("gfx1100",), 2, 256, 16, 16, 8, 1, NONE),
    (CHUNK, ("gfx1201",), 2, 128, 128, 32, 8, 1, NONE),
    (CHUNK, ("gfx1201",), 2, 256, 64, 16, 8, 1, NONE),
    (DECODE, NVIDIA, 4, 64, 16, 16, 4, 2, ALL_REGISTERS),
    (DECODE, CDNA, 4, 128, 16, 16, 4, 2, NONE),
    (FEW, NVIDIA, 4, 64, 16, 16, 4, 1, ALL_REGISTERS),
    (FEW, CDNA, 4, 64, 16, 16, 4, 1, NONE),
    (FEW, NVIDIA, 4, 256, 16, 16, 8, 1, ALL_REGISTERS),
    (FEW, CDNA, 4, 256, 16, 16, 8, 1, NONE),
    (FEW, RDNA, 4, 128, 16, 16, 16, 1, NONE),
)
"""The first row that fits counts. Each tile was chosen so that no register is spilled, with every feature at once."""


def tile(where: Target, kind: str, dtype: str, dim: int) -> Config | None:
    """The tile for heads of up to `dim` values computed in `dtype`, or None where none fits the target."""
    for wanted in KINDS[kind]:
        for known, targets, nbytes, most, m, n, warps, stages, extra in _TABLE:
            if known == wanted and where.name in targets and nbytes == itemsize(dtype) and dim <= most:
                n = max(n, INTERPRETED_N) if interpreting() else n
                unit = "mma" if where.unit in ("wgmma", "tcgen05") and m < MATRIX_ROWS else ""
                sizes = {"BLOCK_M": m, "BLOCK_N": n}
                return Config(sizes, num_warps=warps, num_stages=stages, extra=extra, unit=unit)
    return None


def reads(where: Target) -> frozenset[str]:
    """The dtypes of eight bits that a target's code converts from: NVIDIA's from e4m3fn by an instruction alone; those
    with NaN at -0 are CDNA's."""
    if where.vendor == "amd":
        return _BOTH if where.name in CDNA else _OCP
    return _OCP if where.fp8 else frozenset({_E5M2})


def unreadable(where: Target, problem: AttendProblem) -> str | None:
    """Why keys and values of `kv_dtype` cannot be widened to the problem's dtype on a target."""
    if problem.kv_dtype == problem.dtype or problem.kv_dtype in reads(where):
        return None
    if problem.kv_dtype.startswith("float8"):
        name = where.name if where == TARGETS[where.name] else f"a smaller GPU with the tiles of {where.name}"
        return f"{name} does not convert {problem.kv_dtype}"
    if problem.dtype == "float32" and problem.kv_dtype in ("bfloat16", "float16"):
        return None
    return f"does not read pages of {problem.kv_dtype} as {problem.dtype}"


def splits(where: Target, config: Config, programs: int, keys: int) -> int:
    """Into how many parts the keys of a row are split: enough for a few programs on each multiprocessor, and none
    shorter than a tile. It follows from the bucket, never from the step's lengths.

    programs   those of a launch without splits
    keys       the most that a row may see
    """
    cores = INTERPRETED_CORES if interpreting() else CORES[where.name]
    wanted = -(-WAVES * cores // max(programs, 1))
    return max(1, min(wanted, -(-keys // config.block["BLOCK_N"]), MOST_SPLITS))
