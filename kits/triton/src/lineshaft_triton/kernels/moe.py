"""Rows on their way to experts and back: `moe_dispatch`, a stable counting sort by expert on the device, and
`moe_combine`. No atomic operations, so that every run sorts and adds in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import ExpertProblem
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.kernels.rowwise import common_fields, empty, gapless, grid_over, strided, tiles
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

CHUNK = 1024
"""Assignments that a program of the sort looks at together."""
INTERPRETED_EXPERTS = 8
COLUMNS = 1024
"""Values of a row that a program moves."""
SUMS = 512
"""Sums that a program makes."""


@triton.jit
def sort_kernel(
    ids_ptr, map_ptr, source_ptr, offsets_ptr, count, local, EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """ids int32[count], map int32[experts] -> source int32[count], the assignments by local expert, elsewhere last, in
    their order; offsets int32[local + 1]. Each program places those of EXPERTS experts, and reads all. Grid (blocks of
    local + 1)."""
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    at = tl.arange(0, CHUNK)
    # how many assignments come before each expert's
    place = tl.full((EXPERTS,), 0, tl.int32)
    for start in range(0, count, CHUNK):
        inside = start + at < count
        expert = tl.load(map_ptr + tl.load(ids_ptr + start + at, inside, 0), inside, 0)
        expert = tl.where(expert < 0, local, expert)
        place += tl.sum((inside[None, :] & (expert[None, :] < e[:, None])).to(tl.int32), 1)
    tl.store(offsets_ptr + e, place, e <= local)
    # then each in its turn
    for start in range(0, count, CHUNK):
        inside = start + at < count
        expert = tl.load(map_ptr + tl.load(ids_ptr + start + at, inside, 0), inside, 0)
        expert = tl.where(expert < 0, local, expert)
        own = inside[None, :] & (expert[None, :] == e[:, None])
        turn = tl.cumsum(own.to(tl.int32), 1)
        tl.store(source_ptr + place[:, None] + turn - 1, tl.broadcast_to((start + at)[None, :], own.shape), own)
        place += tl.max(turn, 1)


@triton.jit
def scatter_kernel(
    x_ptr, source_ptr, offsets_ptr, out_ptr, rows, k, x_row, width, local, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x [T, width] -> out [rows, width], row i of it that of token source[i] // k, or 0 from offsets[local] on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < width)
    token = (tl.load(source_ptr + row, row < rows, 0) // k).to(tl.int64)
    x = tl.load(x_ptr + token * x_row + at, inside & (row < tl.load(offsets_ptr + local)), 0.0)
    tl.store(out_ptr + row.to(tl.int64) * width + at, x, inside)


@triton.jit
def invert_kernel(source_ptr, row_ptr, count, BLOCK: tl.constexpr):
    """source int32[count], a permutation -> its inverse."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(row_ptr + tl.load(source_ptr + at, at < count, 0), at, at < count)


@triton.jit
def combine_kernel(
    x_ptr, row_ptr, probs_ptr, out_ptr, rows, k, x_row, probs_row, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x [rows * k, width], the row of each assignment int32[rows * k], probs [rows, k] -> the weighted sums [rows,
    width], of float32, in the order of assignments. What is no row, as after a step of zeros, reads some row."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = token < rows
    inside = there & (at < width)
    acc = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for j in range(k):
        row = tl.load(row_ptr + token * k + j, there, 0)
        row = tl.minimum(tl.maximum(row, 0), rows * k - 1).to(tl.int64)
        prob = tl.load(probs_ptr + token.to(tl.int64) * probs_row + j, there, 0.0)
        acc += prob * tl.load(x_ptr + row * x_row + at, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * width + at, acc.to(out_ptr.dtype.element_ty), inside)


def sort_config(experts: int, assignments: int, where: Target) -> Config:
    """A program for each expert, so that as many as there are sort at once; for decode a chunk is all there is."""
    chunk = min(CHUNK, triton.next_power_of_2(max(assignments, 1)))
    rows = min(INTERPRETED_EXPERTS, triton.next_power_of_2(experts)) if interpreting() else 1
    return Config({"EXPERTS": rows, "CHUNK": chunk}, num_warps=max(1, chunk // 4 // where.warp), num_stages=1)


def bind_dispatch(where: Target, problem: ExpertProblem, session: Any) -> Callable[..., Any]:
    p, count = problem, problem.rows * problem.k
    sort, move = sort_config(p.local + 1, count, where), tiles(count, p.hidden, where, block=COLUMNS)

    def moe_dispatch(
        x: torch.Tensor, ids: torch.Tensor, expert_map: Any, local: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, H], ids int32[T, k], expert_map int32[E] -> (rows [T * k, H] by local expert, offsets
        int32[local + 1], source int32[T * k]); rows for experts elsewhere come last and are 0."""
        x, (_, stride, _) = strided(x)
        source, offsets = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (count, local + 1))
        grid = (triton.cdiv(local + 1, sort.block["EXPERTS"]),)
        launch(session, sort_kernel, grid, sort, gapless(ids), gapless(expert_map), source, offsets, count, local)
        rows = torch.empty((count, p.hidden), dtype=x.dtype, device=x.device)
        launch(
            session, scatter_kernel, grid_over(count, p.hidden, move), move, x, source, offsets, rows, count, p.k,
            stride, p.hidden, local,
        )  # fmt: skip
        return rows, offsets, source

    return moe_dispatch


def bind_combine(where: Target, problem: ExpertProblem, session: Any) -> Callable[..., torch.Tensor]:
    p, count = problem, problem.rows * problem.k
    sums = tiles(p.rows, p.hidden, where, values=SUMS)
    turn = Config({"BLOCK": CHUNK}, num_warps=4, num_stages=1)

    def moe_combine(
        rows: torch.Tensor, source: torch.Tensor, probs: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows [T * k, H], source int32[T * k], probs [T, k] -> the weighted sum of each token's rows [T, H]."""
        (x, (_, stride, _)), (probs, (_, probs_stride, _)) = strided(rows), strided(probs)
        out = empty(out, (p.rows, p.hidden), x)
        row = torch.empty(count, dtype=torch.int32, device=x.device)
        launch(session, invert_kernel, (triton.cdiv(count, CHUNK),), turn, gapless(source), row, count)
        launch(
            session, combine_kernel, grid_over(p.rows, p.hidden, sums), sums, x, row, probs, out, p.rows, p.k, stride,
            probs_stride, p.hidden,
        )  # fmt: skip
        return out

    return moe_combine


def recipes(where: Target) -> list[Recipe]:
    return [
        recipe(
            "triton_moe_dispatch", "moe_dispatch", partial(bind_dispatch, where), priority=TRITON,
            options={"target": where.name},
        ),
        recipe("triton_moe_combine", "moe_combine", partial(bind_combine, where), **common_fields(where)),
    ]  # fmt: skip
