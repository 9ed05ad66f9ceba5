"""The MLPs of routed experts over rows that are sorted by expert, `grouped_mlp`: two grouped products.

A table made on the device says of each tile which expert's it is and where it begins, so that a tile belongs to one
expert, however many rows each has; the grid is what any distribution needs at most. The gate and up products share
their reads of x, and the activation is applied before anything is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import ExpertProblem
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe
from lineshaft_triton.kernels.linear import ALIGNED, FLOATS, readable, walk
from lineshaft_triton.kernels.linear_configs import EXPERT_TIERS, Tier, config, table_of
from lineshaft_triton.kernels.rowwise import gapless
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

MOST = 512
"""Experts of a rank, at most."""
TABLE_TILES = 8
"""Entries of the table of tiles that a program makes."""
ACTIVATIONS = ("silu", "gelu", "swigluoai")


@triton.jit
def tiles_kernel(offsets_ptr, table_ptr, capacity, local, height, TILES: tl.constexpr, EXPERTS: tl.constexpr):
    """offsets int32[local + 1] -> table int32[tiles, 3]: a tile's expert, its first row and the row past its expert's
    last. The rows beyond the last expert's are those of the number `local`; a tile of nobody has -1. Grid (blocks of
    tiles)."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    e = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + e, e <= local, capacity)
    end = tl.load(offsets_ptr + e + 1, e < local, capacity)
    tiles = (end - begin + height - 1) // height
    stop = tl.cumsum(tiles, 0)
    # the expert is as many as have all their tiles before this one
    done = (e <= local)[None, :] & (stop[None, :] <= tile[:, None])
    expert = tl.sum(done.to(tl.int32), 1)
    start = tl.sum(tl.where(done, tiles[None, :], 0), 1)
    somebody = expert <= local
    first = tl.load(offsets_ptr + expert, somebody, 0) + (tile - start) * height
    last = tl.load(offsets_ptr + expert + 1, expert < local, capacity)
    tl.store(table_ptr + tile * 3, tl.where(somebody, expert, -1))
    tl.store(table_ptr + tile * 3 + 1, first)
    tl.store(table_ptr + tile * 3 + 2, last)


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """act(gate) * up; each activation is its argument times a logistic function. NaN stays NaN."""
    if ACTIVATION == "swigluoai":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        turn = ALPHA * gate
    elif ACTIVATION == "gelu":
        # (1 + tanh(z)) / 2 is the logistic function of 2 z
        turn = gate * (1.5957691216057308 + 0.07135481627260025 * gate * gate)
    else:
        turn = gate
    return gate / (1.0 + tl.exp(-turn)) * up


@triton.jit
def expert_kernel(
    x_ptr, w_ptr, bias_ptr, table_ptr, out_ptr, tiles, local, n, k, x_row,
    ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [C, k], w [local, n, k], bias [local, n] -> x w^T + bias [C, n] by the expert of each row, and 0 for rows of no
    expert. With ACTIVATION w is [local, 2 n, k], and the result act(gate) * up; rows of no expert are left out."""
    GATED: tl.constexpr = ACTIVATION != ""
    i, j = walk(tiles, (n + BLOCK_N - 1) // BLOCK_N, GROUP)
    expert = tl.load(table_ptr + i * 3)
    first, last = tl.load(table_ptr + i * 3 + 1), tl.load(table_ptr + i * 3 + 2)
    rows, cols = first + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    kept = (rows < last)[:, None] & (cols < n)[None, :]
    if expert == local:
        if not GATED:
            tl.store(out_at, tl.full((BLOCK_M, BLOCK_N), 0.0, out_ptr.dtype.element_ty), kept)
    elif expert >= 0:
        parts: tl.constexpr = 2 if GATED else 1
        terms = tl.arange(0, BLOCK_K)
        x_rows, w_rows = tl.where(rows < last, rows, first).to(tl.int64), tl.where(cols < n, cols, 0).to(tl.int64)
        x_at = x_ptr + x_rows[:, None] * x_row + terms[None, :]
        w_at = w_ptr + expert.to(tl.int64) * (n * parts) * k + w_rows[:, None] * k + terms[None, :]
        up_at = w_at + n * k
        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        up = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for step in range(0, k, BLOCK_K):
            inside = True if EVEN else (step + terms < k)[None, :]
            x, w = tl.load(x_at, inside, 0.0), tl.load(w_at, inside, 0.0)
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
            if GATED:
                up = tl.dot(x, tl.load(up_at, inside, 0.0).T, up, input_precision="ieee")
            x_at += BLOCK_K
            w_at += BLOCK_K
            up_at += BLOCK_K
        if BIAS:
            bias_at = bias_ptr + expert.to(tl.int64) * (n * parts) + cols
            acc += tl.load(bias_at, cols < n, 0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias_at + n, cols < n, 0.0).to(tl.float32)[None, :]
        if GATED:
            acc = activated(acc, up, ACTIVATION, ALPHA, LIMIT)
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), kept)


@dataclass(frozen=True)
class Grouped:
    """The two products of a problem on a target, settled when they are bound."""

    session: Any
    problem: ExpertProblem
    gated: Config
    plain: Config
    expects: tuple[str, str]

    @property
    def tiles(self) -> int:
        """Tiles at most, those of the rows of no expert among them: no expert has two that are not full."""
        rows = self.problem.rows
        return min(rows, rows // self.plain.block["BLOCK_M"] + self.problem.local + 1)

    def table(self, offsets: torch.Tensor) -> torch.Tensor:
        """offsets int32[L + 1] -> the tiles' experts and rows, int32[tiles, 3]."""
        p, height = self.problem, self.plain.block["BLOCK_M"]
        programs = triton.cdiv(self.tiles, TABLE_TILES)
        table = torch.empty((programs * TABLE_TILES, 3), dtype=torch.int32, device=offsets.device)
        block = {"TILES": TABLE_TILES, "EXPERTS": triton.next_power_of_2(p.local + 1)}
        launch(
            self.session, tiles_kernel, (programs,), Config(block, num_warps=4, num_stages=1), gapless(offsets), table,
            p.rows, p.local, height,
        )  # fmt: skip
        return table

    def product(self, x: torch.Tensor, w: torch.Tensor, bias: Any, table: torch.Tensor, gated: bool) -> torch.Tensor:
        """x [C, k] and each row's expert's of w -> [C, n]; of w's rows half are gates where it is gated."""
        p, chosen = self.problem, self.gated if gated else self.plain
        n, k = w.shape[1] // 2 if gated else w.shape[1], w.shape[2]
        out = torch.empty((p.rows, n), dtype=x.dtype, device=x.device)
        grid = (self.tiles * triton.cdiv(n, chosen.block["BLOCK_N"]),)
        launch(
            self.session, expert_kernel, grid, chosen, x, w, x if bias is None else gapless(bias), table, out,
            self.tiles, p.local, n, k, x.stride(0), expects=self.expects[0 if gated else 1],
            ACTIVATION=p.activation if gated else "", ALPHA=p.swiglu_alpha, LIMIT=p.swiglu_limit,
            BIAS=bias is not None, EVEN=k % chosen.block["BLOCK_K"] == 0,
        )  # fmt: skip
        return out


def bind_grouped(where: Target, tier: Tier, problem: ExpertProblem, session: Any) -> Callable[..., torch.Tensor]:
    even = problem.hidden % ALIGNED == 0 and problem.width % ALIGNED == 0
    kind = table_of(problem.dtype, even)
    gated, plain = config(where, f"gated_{kind}", tier), config(where, kind, tier)
    expects = where.expects(problem.dtype, gated.unit), where.expects(problem.dtype, plain.unit)
    how = Grouped(session, problem, gated, plain, expects)

    def grouped_mlp(
        x: torch.Tensor, w13: Any, w2: Any, offsets: torch.Tensor, *, w13_bias: Any = None, w2_bias: Any = None
    ) -> torch.Tensor:
        """x [C, H], w13 [L, 2F, H], w2 [L, H, F], offsets int32[L + 1], biases [L, 2F] and [L, H] -> [C, H]: expert e's
        gated MLP of rows offsets[e] to offsets[e + 1], and 0 from offsets[L] on; the hidden activation is rounded."""
        table = how.table(offsets)
        hidden = how.product(readable(x), dense(w13), w13_bias, table, gated=True)
        return how.product(hidden, dense(w2), w2_bias, table, gated=False)

    return grouped_mlp


def declines(tier: Tier, problem: ExpertProblem) -> str | None:
    if problem.dtype not in FLOATS:
        return f"accumulates in float32, for {', '.join(FLOATS)}, not {problem.dtype}"
    if problem.activation not in ACTIVATIONS:
        return f"knows the activations {', '.join(ACTIVATIONS)}, not {problem.activation!r}"
    if problem.local > MOST:
        return f"takes {MOST} experts of a rank at most, not {problem.local}"
    return tier.reason(triton.cdiv(problem.rows, problem.experts))


def recipes(where: Target) -> list[Recipe]:
    return [
        recipe(
            f"triton_grouped_mlp_{tier.name}", "grouped_mlp", partial(bind_grouped, where, tier), layout=DENSE,
            priority=TRITON, tunable=True, supports=partial(declines, tier), options={"target": where.name},
            handles=frozenset({"bias", "swiglu_alpha", "swiglu_limit"}),
        )
        for tier in EXPERT_TIERS
    ]  # fmt: skip
