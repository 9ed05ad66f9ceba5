"""What kernels over logits share: how they read a vocabulary in blocks, and how its values are ordered.

Knows no op. A program takes whole rows and reads them block by block, so that no vocabulary is too large.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
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
FEWEST_SPANS: Final = 8
"""Sums of the smallest vocabulary: those of up to 2^17 values share a program."""
AHEAD: Final = MappingProxyType({"nvidia": 3, "amd": 2})
"""Blocks that are on their way from memory at a time: into shared memory, or for AMD into registers."""
PIVOTS: Final = 4
"""Thresholds that a pass over a row tries."""
INTERPRETED: Final = 1 << 18
"""Values that a program holds at a time under the interpreter, which pays for each operation, hardly for its size."""


def scan_config(rows: int, vocab: int, where: Target) -> Config:
    """ROWS x BLOCK values at a time, AHEAD of them on their way."""
    high, block = 1, BLOCK
    if interpreting():
        block = min(triton.next_power_of_2(vocab), INTERPRETED // 16)
        high = min(triton.next_power_of_2(max(rows, 1)), INTERPRETED // block)
    return Config(
        {"ROWS": high, "BLOCK": block, "AHEAD": AHEAD[where.vendor]}, num_warps=THREADS // where.warp, num_stages=1
    )


def span_config(scan: Config, vocab: int) -> Config:
    """`scan` with sums of SPAN values, of which COUNT cover the vocabulary."""
    span = scan.block["BLOCK"] * (1 if interpreting() else SPAN)
    sizes = {"SPAN": span, "COUNT": max(FEWEST_SPANS, triton.next_power_of_2(triton.cdiv(vocab, span)))}
    return replace(scan, block={**scan.block, **sizes})


def pivot_config(scan: Config) -> Config:
    """`scan` with PIVOTS."""
    pivots = PIVOTS
    if interpreting():
        pivots = max(PIVOTS, min(32, 4 * INTERPRETED // (scan.block["ROWS"] * scan.block["BLOCK"])))
    return replace(scan, block={**scan.block, "PIVOTS": pivots})


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
def extremes(x_row, vocab, ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """x_row [ROWS, 1] points at rows -> their largest value, the lowest id of it, and their smallest value above -inf,
    which is -inf for a row with a NaN."""
    best = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    best_at = tl.full((ROWS, BLOCK), 0, tl.int32)
    least = tl.full((ROWS, BLOCK), float("inf"), tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=AHEAD):
        at = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_row + at, at < vocab, float("-inf")).to(tl.float32)
        larger = x > best  # which no NaN is
        best_at = tl.where(larger, at, best_at)
        best = tl.where(larger, x, best)
        least = tl.minimum(least, tl.where(x == x, tl.where(x > float("-inf"), x, float("inf")), float("-inf")))
    peak = tl.max(best, 1)
    return peak, tl.min(tl.where(best == peak[:, None], best_at, vocab), 1), tl.min(least, 1)
