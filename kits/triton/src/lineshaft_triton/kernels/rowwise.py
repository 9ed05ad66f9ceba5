"""How row-wise kernels cut their work into tiles, and how they see arrays whose rows are not dense. Knows no kernel."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton

from lineshaft_contract.problems import Problem
from lineshaft_torch.bound import dense
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.launch import Config
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

VALUES: Final = 2048
"""Values that one program takes: many small programs keep the memory of a GPU busy."""
PER_THREAD: Final = 8
"""Values that a thread takes at a time: 16 bytes of a 16-bit dtype, the widest load."""
THREADS: Final = 1024
"""Threads of a program, at most."""
INTERPRETED: Final = 1 << 18
"""Values that a program takes under the interpreter, which pays for each program and hardly for its size."""

Strides = tuple[int, int, int]
"""(inner, outer stride, inner stride): row r lies at (r // inner) * outer stride + (r % inner) * inner stride."""


def declines_float64(problem: Problem) -> str | None:
    """The `supports` of kernels that take every other dtype."""
    return "computes in float32, which is too narrow for float64" if problem.dtype == "float64" else None


def tiles(rows: int, width: int, where: Target, *, values: int = VALUES, block: int = VALUES) -> Config:
    """ROWS x BLOCK of rows of `width` values: BLOCK is at most `block`, and so many narrow rows that a program has
    `values` values; under the interpreter as many as there are."""
    if interpreting():
        values = INTERPRETED
    wide = min(triton.next_power_of_2(width), block)
    high = max(1, min(triton.next_power_of_2(rows), values // wide))
    return Config({"ROWS": high, "BLOCK": wide}, num_warps=warps(high * wide, where), num_stages=1)


def grid_over(rows: int, width: int, config: Config) -> tuple[int, int]:
    """The programs of ROWS x BLOCK that cover rows x width."""
    return triton.cdiv(rows, config.block["ROWS"]), triton.cdiv(width, config.block["BLOCK"])


def warps(values: int, where: Target) -> int:
    """Warps of a program that holds so many values at a time."""
    return max(1, min(values // PER_THREAD, THREADS) // where.warp)


def strided(x: torch.Tensor) -> tuple[torch.Tensor, Strides]:
    """x [..., W] and where its rows lie; a dense copy of it where three numbers cannot tell."""
    if x.dim() > 3 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        x = x.contiguous()
    if x.is_contiguous():
        return x, (1, x.shape[-1], 0)
    if x.dim() == 2:
        return x, (1, x.stride(0), 0)
    return x, (x.shape[1], x.stride(0), x.stride(1))


def gapless(x: Any) -> torch.Tensor:
    """A vector, or other operand that a kernel reads by place alone: the array or dense weight itself, or a dense copy
    where it is a slice, as a forward may make of any array."""
    found: torch.Tensor = dense(x)
    return found.contiguous()


def empty(out: torch.Tensor | None, shape: Any, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`out`, or a fresh array on the device of `like`, in its dtype where none is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device) if out is None else out


def common_fields(where: Target) -> dict[str, Any]:
    """What the recipes of all row-wise kernels say of them."""
    return {
        "out": True,
        "priority": TRITON,
        "supports": declines_float64,
        "options": {"target": where.name},
    }
