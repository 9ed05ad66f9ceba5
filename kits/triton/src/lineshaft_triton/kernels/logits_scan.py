"""What kernels over logits share: how they read a vocabulary in blocks, and how its values are ordered.

Knows no op. A program takes whole rows and reads them block by block, so that no vocabulary is too large.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.launch import Config
from lineshaft_triton.targets import Target

THREADS: Final = 512
"""Threads of a program, which has a multiprocessor to itself where rows are few."""
BLOCK: Final = 2048
"""Values of a row that it holds at a time."""
SPAN: Final = 8
"""Blocks after which it notes a sum: to find a place in a row it need not read all blocks twice."""
AHEAD: Final = 4
"""Blocks that are on their way from memory at a time."""
PIVOTS: Final = 4
"""Thresholds that a pass over a row tries."""
INTERPRETED: Final = 1 << 18
"""Values that a program holds at a time under the interpreter, which pays for each operation, hardly for its size."""


def scan_config(rows: int, vocab: int, where: Target, *, search: bool = False) -> Config:
    """ROWS x BLOCK values at a time, AHEAD of them on their way. With `search` also PIVOTS, and sums of SPAN values, of
    which COUNT cover the vocabulary."""
    high, block, span, pivots = 1, BLOCK, SPAN * BLOCK, PIVOTS
    if interpreting():
        block = span = min(triton.next_power_of_2(vocab), INTERPRETED // 16)
        high = min(triton.next_power_of_2(rows), max(1, INTERPRETED // block))
        pivots = max(PIVOTS, min(32, 4 * INTERPRETED // (high * block)))
    sizes = {"ROWS": high, "BLOCK": block, "AHEAD": AHEAD}
    if search:
        sizes |= {"SPAN": span, "COUNT": triton.next_power_of_2(triton.cdiv(vocab, span)), "PIVOTS": pivots}
    return Config(sizes, num_warps=THREADS // where.warp, num_stages=1)


@triton.jit
def key_of(x):
    """float32 -> int32 in the same order, -0 as 0: the bits of negative values are turned, as radix sorts do."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 whose `key_of` is int32 `key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def peak_of(x_row, live, vocab, BLOCK: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    """x_row [ROWS, 1] points at rows -> their largest value, +inf for a NaN among them, and the lowest id of it."""
    best = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    best_at = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=AHEAD):
        at = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_row + at, live & (at < vocab), float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        best_at = tl.where(x > best, at, best_at)
        best = tl.maximum(best, x)
    peak = tl.max(best, 1)
    return peak, tl.min(tl.where(best == peak[:, None], best_at, vocab), 1)
