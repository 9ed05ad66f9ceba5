"""Products with weights, `linear` and `head_linear`: one tiled kernel, whose tiles tables choose.

Programs are ordered so that those which run together share rows and columns in the L2 cache (the grouped order of
Triton's tutorial "Matrix Multiplication"). Where a product has too few tiles to occupy a device, the terms of its sums
are split among programs, and a second kernel adds the parts in their order, so that a result is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.ops.quantize import NONE, WEIGHT_SCHEMES
from lineshaft_contract.problems import LinearProblem
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe
from lineshaft_triton.kernels.linear_configs import CODE_TIERS, GROUP_ROWS, TIERS, Tier, config, parts
from lineshaft_triton.kernels.quant import missing, packing
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

Out = torch.Tensor | None
FINISH = Config({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4, num_stages=1)
ALTERNATE = TRITON - 1
"""The priority of tiles that a plan takes only once it has measured them."""
FLOATS = ("bfloat16", "float16", "float32")


@triton.jit
def finished(acc, cols, n, scale_ptr, bias_ptr, SCALED: tl.constexpr, BIAS: tl.constexpr):
    """Sums acc [rows, cols] times the weight's scales, plus the bias, in float32."""
    acc = acc.to(tl.float32)
    inside = cols < n
    if SCALED:
        acc = acc * tl.load(scale_ptr + cols, inside, 0.0)[None, :]
    if BIAS:
        acc = acc + tl.load(bias_ptr + cols, inside, 0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, out_ptr, m, n, k, x_row, x_head, out_row, span,
    SCALED: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [m, heads, k], w [heads, n, k] -> out [m, heads, n], or with SPLIT parts f32[parts, m, n] of sums over `span`
    terms. Grid (tiles, parts, heads). EVEN: BLOCK_K divides every part."""
    # which tile, in groups of GROUP rows of tiles
    down, across = (m + BLOCK_M - 1) // BLOCK_M, (n + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first = pid // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    inner = pid % (GROUP * across)
    rows = (first + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = inner // height * BLOCK_N + tl.arange(0, BLOCK_N)
    part, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    # rows and columns beyond the last read the first ones, and are not stored
    start = part * span
    terms = start + tl.arange(0, BLOCK_K)
    x_rows, w_rows = tl.where(rows < m, rows, 0).to(tl.int64), tl.where(cols < n, cols, 0).to(tl.int64)
    x_at = x_ptr + head * x_head + x_rows[:, None] * x_row + terms[None, :]
    w_at = w_ptr + head * n * k + w_rows[None, :] * k + terms[:, None]
    end = min(start + span, k)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for _ in range(start, end, BLOCK_K):
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = terms < end
            x, w = tl.load(x_at, inside[None, :], 0.0), tl.load(w_at, inside[:, None], 0.0)
            terms += BLOCK_K
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    # the only rounding
    at = rows.to(tl.int64)[:, None] * out_row + cols[None, :]
    kept = (rows < m)[:, None] & (cols < n)[None, :]
    if SPLIT:
        tl.store(out_ptr + part.to(tl.int64) * m * n + at, acc, kept)
    else:
        acc = finished(acc, cols, n, scale_ptr, bias_ptr, SCALED, BIAS)
        tl.store(out_ptr + head * n + at, acc.to(out_ptr.dtype.element_ty), kept)


@triton.jit
def finish_kernel(
    parts_ptr, scale_ptr, bias_ptr, out_ptr, m, n, PARTS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts f32[PARTS, m, n] -> their sum, scaled, with the bias, rounded [m, n]. Grid (blocks of m, blocks of n)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows.to(tl.int64)[:, None] * n + cols[None, :]
    kept = (rows < m)[:, None] & (cols < n)[None, :]
    acc = tl.load(parts_ptr + at, kept, 0.0)
    for _ in tl.static_range(1, PARTS):
        parts_ptr += m * n
        acc += tl.load(parts_ptr + at, kept, 0.0)
    acc = finished(acc, cols, n, scale_ptr, bias_ptr, SCALED, BIAS)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), kept)


@dataclass(frozen=True)
class Tiled:
    """A product's way through the kernels above, settled when it is bound.

    expects   the class of matrix instructions of its tiles
    parts     into how many parts its sums are split
    """

    session: Any
    problem: LinearProblem
    chosen: Config
    expects: str
    parts: int

    def run(self, x: torch.Tensor, w: torch.Tensor, scale: Any, bias: Any, out: torch.Tensor) -> torch.Tensor:
        """x [m, heads, k] with dense terms, w [heads, n, k], scale f32[n], bias [n] or None -> out [m, heads, n]."""
        p, heads, block = self.problem, x.shape[1], self.chosen.block
        tiles = triton.cdiv(p.m, block["BLOCK_M"]) * triton.cdiv(p.n, block["BLOCK_N"])
        span = triton.cdiv(triton.cdiv(p.k, self.parts), block["BLOCK_K"]) * block["BLOCK_K"]
        split = self.parts > 1
        sums = torch.empty((self.parts, p.m, p.n), dtype=torch.float32, device=x.device) if split else out
        launch(
            self.session, linear_kernel, (tiles, self.parts, heads), self.chosen, x, w, _or(scale, x), _or(bias, x),
            sums, p.m, p.n, p.k, x.stride(0), x.stride(1), heads * p.n, span, expects=self.expects,
            SCALED=scale is not None, BIAS=bias is not None, SPLIT=split, EVEN=p.k % block["BLOCK_K"] == 0,
        )  # fmt: skip
        if split:
            grid = triton.cdiv(p.m, FINISH.block["BLOCK_M"]), triton.cdiv(p.n, FINISH.block["BLOCK_N"])
            launch(
                self.session, finish_kernel, grid, FINISH, sums, _or(scale, x), _or(bias, x), out, p.m, p.n,
                PARTS=self.parts, SCALED=scale is not None, BIAS=bias is not None,
            )  # fmt: skip
        return out


def _or(array: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """`array`, or where there is none what stands in its place and is not read."""
    return other if array is None else array


def dense_terms(x: torch.Tensor) -> torch.Tensor:
    """x itself where the terms of a row lie densely, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kind_of(problem: LinearProblem) -> str:
    """The table of a problem's tiles."""
    if problem.dtype == "float32":
        return "single"
    return "half" if problem.scheme == NONE else "codes"


def tiled(problem: LinearProblem, session: Any, where: Target, tier: Tier, index: int) -> Tiled:
    """How a problem of a tier runs on a target."""
    chosen = config(where, kind_of(problem), tier, index)
    tiles = triton.cdiv(problem.m, chosen.block["BLOCK_M"]) * triton.cdiv(problem.n, chosen.block["BLOCK_N"])
    split = tier.last <= GROUP_ROWS and not problem.heads
    found = parts(where, tiles, problem.k, chosen) if split else 1
    return Tiled(session, problem, chosen, where.expects(problem.dtype, chosen.unit), found)


def bind_linear(problem: LinearProblem, how: Tiled) -> Callable[..., torch.Tensor]:
    def linear(x: torch.Tensor, w: Any, *, bias: Any = None, out: Out = None) -> torch.Tensor:
        """x [T, I], w [O, I] or codes [O, I] with scales f32[O], bias [O] -> x w^T + bias [T, O]; sums in float32."""
        out = torch.empty((problem.m, problem.n), dtype=x.dtype, device=x.device) if out is None else out
        x = dense_terms(x).unsqueeze(1)
        if problem.scheme == NONE:
            return how.run(x, dense(w), None, dense(bias), out)
        return how.run(x, w.arrays["q"], w.arrays["scale"], dense(bias), out)

    return linear


def bind_heads(problem: LinearProblem, how: Tiled) -> Callable[..., torch.Tensor]:
    def head_linear(x: torch.Tensor, w: Any, *, out: Out = None) -> torch.Tensor:
        """x [T, H, I], w [H, O, I] -> per head x w^T [T, H, O]."""
        shape = problem.m, problem.heads, problem.n
        out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
        return how.run(dense_terms(x), dense(w), None, None, out)

    return head_linear


def declines(problem: LinearProblem, where: Target, tier: Tier, scheme: str) -> str | None:
    """Why a kernel of a tier and a scheme does not take a problem."""
    if problem.dtype not in FLOATS:
        return f"accumulates in float32, for {', '.join(FLOATS)}, not {problem.dtype}"
    if problem.scheme != scheme:
        return f"is for weights of scheme {scheme}, not {problem.scheme}"
    if problem.dtype == "float32" and not tier.default:
        return "its tile is for numbers of 16 bits"
    if scheme != NONE and missing(scheme, where):
        return missing(scheme, where)
    return tier.reason(problem.m)


def tier_recipe(where: Target, tier: Tier, index: int, op: str, scheme: str = NONE) -> Recipe:
    """The recipe of one tile, for `linear` with weights of a scheme or for `head_linear`."""

    def bind(problem: LinearProblem, session: Any) -> Callable[..., torch.Tensor]:
        how = tiled(problem, session, where, tier, index)
        return bind_heads(problem, how) if problem.heads else bind_linear(problem, how)

    layout, pack = (DENSE, None) if scheme == NONE else packing(scheme, where)
    features = {"heads"} if op == "head_linear" else {"bias"} if scheme == NONE else {"bias", "scheme"}
    stem = f"triton_{op}" if scheme == NONE else f"triton_{op}_{scheme}"
    return recipe(
        f"{stem}_{tier.name}", op, bind, out=True, layout=layout, pack=pack, handles=frozenset(features),
        supports=lambda problem: declines(problem, where, tier, scheme), tunable=True,
        priority=TRITON if tier.default else ALTERNATE, options={"target": where.name},
    )  # fmt: skip


def recipes(where: Target) -> list[Recipe]:
    dense_ones = [tier_recipe(where, tier, i, "linear") for i, tier in enumerate(TIERS)]
    heads = [tier_recipe(where, tier, i, "head_linear") for i, tier in enumerate(TIERS) if tier.default]
    codes = [
        tier_recipe(where, tier, i, "linear", scheme) for scheme in WEIGHT_SCHEMES for i, tier in enumerate(CODE_TIERS)
    ]
    return [*dense_ones, *heads, *codes]
