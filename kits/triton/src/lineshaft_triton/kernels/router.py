"""The router of a mixture of experts: `router_topk`, a softmax and a choice of the k best, one pass over the logits.

The k largest are found by as many reductions over keys that hold a logit and, for those that tie, its place; so ties go
to the lowest expert, and NaN comes last, whatever the order of a reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import RouterProblem
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_triton.kernels.rowwise import declines_float64, strided, tiles
from lineshaft_triton.launch import launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

MOST = 1024
"""Experts whose logits a program holds."""
VALUES = 512
"""Logits that a program takes."""


@triton.jit
def ordered(x, last: tl.constexpr):
    """float32 -> int32 in the same order, with -0 as 0 and NaN as `last`."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, last, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def router_kernel(
    x_ptr, ids_ptr, probs_ptr, rows, experts, x_row, size, scale,
    K: tl.constexpr, COLUMNS: tl.constexpr, BEFORE: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr, GROUP_TOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [rows, experts] -> ids int32[rows, K], probs f32[rows, K]; `size` experts are a group. Grid (blocks)."""
    LEAST: tl.constexpr = -(1 << 63)
    NOTHING: tl.constexpr = -(1 << 31) + 1
    INFINITE: tl.constexpr = -(1 << 31) + 0x7FFFFF  # -inf
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, BLOCK)[None, :]
    x_at = x_ptr + row.to(tl.int64) * x_row
    there = row < rows
    inside = there & (e < experts)
    x = tl.load(x_at + e, inside, float("-inf")).to(tl.float32)
    key = ordered(x, NOTHING)
    if GROUPS:
        # the best logit of each group, of a group with a NaN the last; then the best groups
        peaks = ordered(x, 0x7FFFFFFF)
        g = tl.arange(0, GROUP_COLUMNS)[None, :]
        best = tl.full((ROWS, GROUP_COLUMNS), LEAST, tl.int64)
        for group in tl.static_range(GROUPS):
            peak = tl.max(tl.where(e // size == group, peaks, NOTHING), 1)
            peak = tl.where(peak == 0x7FFFFFFF, NOTHING, peak)[:, None].to(tl.int64)
            best = tl.where(g == group, (peak << 32) | (GROUPS - group), best)
        eligible = e < 0
        for _ in tl.static_range(GROUP_TOP):
            top = tl.max(best, 1)[:, None]
            eligible = eligible | (e // size == GROUPS - (top & 0xFFFFFFFF))
            best = tl.where(best == top, LEAST, best)
        key = tl.where(eligible, key, INFINITE)
    keys = tl.where(inside, (key.to(tl.int64) << 32) | (BLOCK - e).to(tl.int64), LEAST)
    # the k best, one after another
    column = tl.arange(0, COLUMNS)[None, :]
    ids = tl.full((ROWS, COLUMNS), 0, tl.int32)
    for j in tl.static_range(K):
        top = tl.max(keys, 1)[:, None]
        ids = tl.where(column == j, (BLOCK - (top & 0xFFFFFFFF)).to(tl.int32), ids)
        keys = tl.where(keys == top, LEAST, keys)
    kept = there & (column < K)
    chosen = tl.load(x_at + ids, kept, float("-inf")).to(tl.float32)
    # their weights; a NaN among what the softmax is over makes all of them NaN
    over = x if BEFORE else chosen
    peak = tl.max(over, 1)[:, None]
    probs = tl.exp(chosen - peak) / tl.sum(tl.exp(over - peak), 1)[:, None]
    if RENORMALISE:
        probs = probs / tl.sum(tl.where(kept, probs, 0.0), 1)[:, None]
    at = row.to(tl.int64) * K + column
    tl.store(ids_ptr + at, ids, kept)
    tl.store(probs_ptr + at, probs * scale, kept)


def supports(problem: RouterProblem) -> str | None:
    if problem.experts > MOST:
        return f"holds the logits of at most {MOST} experts, not {problem.experts}"
    return declines_float64(problem)


def bind_router(where: Target, problem: RouterProblem, session: Any) -> Callable[..., Any]:
    p, config = problem, tiles(problem.rows, problem.experts, where, values=VALUES)

    def router_topk(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [T, E] -> (ids int32[T, k], weights f32[T, k]), largest first, ties to the lowest id."""
        x, (_, stride, _) = strided(logits)
        ids = torch.empty((p.rows, p.k), dtype=torch.int32, device=x.device)
        probs = torch.empty((p.rows, p.k), dtype=torch.float32, device=x.device)
        launch(
            session, router_kernel, (triton.cdiv(p.rows, config.block["ROWS"]),), config, x, ids, probs, p.rows,
            p.experts, stride, p.experts // max(p.groups, 1), p.scale, K=p.k, COLUMNS=triton.next_power_of_2(p.k),
            BEFORE=p.softmax == "before", RENORMALISE=p.renormalise, GROUPS=p.groups,
            GROUP_COLUMNS=triton.next_power_of_2(max(p.groups, 1)), GROUP_TOP=p.group_top,
        )  # fmt: skip
        return ids, probs

    return router_topk


def recipes(where: Target) -> list[Recipe]:
    return [
        recipe(
            "triton_router_topk", "router_topk", partial(bind_router, where), priority=TRITON, supports=supports,
            handles=frozenset({"groups"}), options={"target": where.name},
        )
    ]  # fmt: skip
