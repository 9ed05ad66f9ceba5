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

from lineshaft_contract.ops.quantize import INT4, LINEAR_SCHEMES, NONE
from lineshaft_contract.problems import LinearProblem
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe
from lineshaft_triton.kernels.linear_configs import (
    CODE_TIERS,
    FEWEST_TERMS,
    GROUP_ROWS,
    HALF,
    TIERS,
    Tier,
    config,
    parts,
    table_of,
)
from lineshaft_triton.kernels.quant import Codes, codes_of, quantized
from lineshaft_triton.kernels.rowwise import gapless
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

Out = torch.Tensor | None
ADD_PARTS = Config({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4, num_stages=1)
ALTERNATE = TRITON - 1
"""The priority of tiles that a plan takes only once it has measured them."""
ALIGNED = 16
"""Numbers, and bytes, to a multiple of which a row has to begin for Triton to read whole vectors."""
LARGEST_SUM = (1 << 31) // 127**2
"""Products of int8 codes whose sum an int32 holds."""
FLOATS = ("bfloat16", "float16", "float32")


@triton.jit
def walk(down, across, GROUP: tl.constexpr):
    """This program's place among down x across tiles, where programs walk down GROUP tiles before the next column."""
    pid = tl.program_id(0)
    first = pid // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    inner = pid % (GROUP * across)
    return first + inner % height, inner // height


@triton.jit
def finish(
    acc, out_ptr, rows, cols, m, n, out_row, scale_ptr, token_ptr, bias_ptr,
    SCALED: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Store sums acc [rows, cols], times the scales of tokens and of the weight, plus the bias, rounded once."""
    acc = acc.to(tl.float32)
    if TOKENS:
        acc = acc * tl.load(token_ptr + rows, rows < m, 0.0)[:, None]
    if SCALED:
        acc = acc * tl.load(scale_ptr + cols, cols < n, 0.0)[None, :]
    if BIAS:
        acc = acc + tl.load(bias_ptr + cols, cols < n, 0.0).to(tl.float32)[None, :]
    out_at = (out_ptr + rows.to(tl.int64) * out_row)[:, None] + cols[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), (rows < m)[:, None] & (cols < n)[None, :])


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, scale_ptr, token_ptr, bias_ptr, out_ptr, m, n, k, x_row, x_head, out_row, span,
    SCALED: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [m, heads, k], w [heads, n, k] -> out [m, heads, n], or with SPLIT parts [parts, m, n] of sums over `span`
    terms. w and x may be codes; two codes of four bits lie in a byte where GROUP_SIZE of them share a scale. Grid
    (tiles, parts, heads). EVEN: BLOCK_K divides every part."""
    FOUR: tl.constexpr = GROUP_SIZE > 0
    WHOLE: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    FLOAT8: tl.constexpr = TOKENS and not WHOLE
    i, j = walk((m + BLOCK_M - 1) // BLOCK_M, (n + BLOCK_N - 1) // BLOCK_N, GROUP)
    rows, cols = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    part, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = part * span
    end = min(start + span, k)
    # rows and columns beyond the last read the first ones, and are not stored
    x_rows, w_rows = tl.where(rows < m, rows, 0).to(tl.int64), tl.where(cols < n, cols, 0).to(tl.int64)
    terms = start + tl.arange(0, BLOCK_K)
    x_at = x_ptr + head * x_head + x_rows[:, None] * x_row + terms[None, :]
    if FOUR:
        w_at = w_ptr + w_rows[:, None] * (k // 2) + (start // 2 + tl.arange(0, BLOCK_K // 2))[None, :]
        scale_at = scale_ptr + w_rows * (k // GROUP_SIZE)
    else:
        w_at = w_ptr + head * n * k + w_rows[:, None] * k + terms[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32 if WHOLE else tl.float32)
    for step in range(start, end, BLOCK_K):
        if FOUR:
            # codes are exact in x's dtype, so that scales alone round, in float32
            x, pairs = tl.load(x_at), tl.load(w_at)
            w = tl.join(pairs & 15, pairs >> 4).reshape(BLOCK_N, BLOCK_K).to(tl.int8) - 8
            scale = tl.load(scale_at + step // GROUP_SIZE)
            acc += tl.dot(x, w.to(x.dtype).T, input_precision="ieee") * scale[None, :]
            w_at += BLOCK_K // 2
        else:
            if EVEN:
                x, w = tl.load(x_at), tl.load(w_at)
            else:
                inside = (step + tl.arange(0, BLOCK_K) < end)[None, :]
                x, w = tl.load(x_at, inside, 0.0), tl.load(w_at, inside, 0.0)
            if FLOAT8:
                # Hopper adds products of eight bits in fewer bits than float32 has: leave them after each block
                acc = tl.dot(x, w.T, acc, max_num_imprecise_acc=BLOCK_K)
            else:
                acc = tl.dot(x, w.to(x.dtype).T, acc, input_precision="ieee", out_dtype=acc.dtype)
            w_at += BLOCK_K
        x_at += BLOCK_K
    if SPLIT:
        finish(
            acc, out_ptr + part.to(tl.int64) * m * n, rows, cols, m, n, n, scale_ptr, token_ptr, bias_ptr,
            False, False, False,
        )  # fmt: skip
    else:
        finish(
            acc, out_ptr + head * n, rows, cols, m, n, out_row, scale_ptr, token_ptr, bias_ptr, SCALED, TOKENS, BIAS
        )  # fmt: skip


@triton.jit
def add_parts_kernel(
    parts_ptr, scale_ptr, token_ptr, bias_ptr, out_ptr, m, n, PARTS: tl.constexpr, SCALED: tl.constexpr,
    TOKENS: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    finish(acc, out_ptr, rows, cols, m, n, n, scale_ptr, token_ptr, bias_ptr, SCALED, TOKENS, BIAS)


@dataclass(frozen=True)
class Operands:
    """What a product reads: x [m, heads, k] with dense terms and w [heads, n, k], or codes of either; scales f32[n] of
    w, or f32[n, groups] of codes of four bits, and f32[m] of x; bias [n]."""

    x: torch.Tensor
    w: torch.Tensor
    scale: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """Scale, tokens and bias, with x in the place of one that is not there, and not read."""
        return tuple(self.x if array is None else array for array in (self.scale, self.tokens, self.bias))

    @property
    def given(self) -> dict[str, Any]:
        """Which of them the end of a sum has to do with."""
        there = self.scale is not None and self.scale.dim() == 1
        return {"SCALED": there, "TOKENS": self.tokens is not None, "BIAS": self.bias is not None}


@dataclass(frozen=True)
class Tiled:
    """A product's way through the kernels above, settled when it is bound.

    expects  the class of matrix instructions of its tiles
    parts    into how many parts its sums are split
    """

    session: Any
    problem: LinearProblem
    chosen: Config
    expects: str
    parts: int

    def run(self, given: Operands, out: torch.Tensor) -> torch.Tensor:
        """The product [m, heads, n], written to `out`."""
        p, block, x = self.problem, self.chosen.block, given.x
        heads = x.shape[1]
        tiles = triton.cdiv(p.m, block["BLOCK_M"]) * triton.cdiv(p.n, block["BLOCK_N"])
        span = triton.cdiv(triton.cdiv(p.k, self.parts), block["BLOCK_K"]) * block["BLOCK_K"]
        split = self.parts > 1
        sums = torch.empty((self.parts, p.m, p.n), dtype=torch.float32, device=x.device) if split else out
        launch(
            self.session, linear_kernel, (tiles, self.parts, heads), self.chosen, x, given.w, *given.pointers, sums,
            p.m, p.n, p.k, x.stride(0), x.stride(1), heads * p.n, span, expects=self.expects, SPLIT=split,
            EVEN=p.k % block["BLOCK_K"] == 0, GROUP_SIZE=p.group_size, **given.given,
        )  # fmt: skip
        if split:
            grid = triton.cdiv(p.m, ADD_PARTS.block["BLOCK_M"]), triton.cdiv(p.n, ADD_PARTS.block["BLOCK_N"])
            launch(
                self.session, add_parts_kernel, grid, ADD_PARTS, sums, *given.pointers, out, p.m, p.n,
                PARTS=self.parts, **given.given,
            )  # fmt: skip
        return out


def readable(x: torch.Tensor) -> torch.Tensor:
    """x itself where the terms of its rows lie densely and its rows are as aligned as their length lets them be, so
    that they are read in whole vectors; else a copy."""
    if x.stride(-1) != 1:
        return x.contiguous()
    uneven = x.data_ptr() % ALIGNED or any(stride % ALIGNED for stride in x.stride()[:-1])
    return x.contiguous() if uneven and x.shape[-1] % ALIGNED == 0 else x


def kind_of(problem: LinearProblem, codes: Codes | None) -> str:
    """The table of a problem's tiles."""
    even = problem.k % ALIGNED == 0
    if codes is not None and codes.activations:
        return table_of(codes.dtype, even)
    kind = table_of(problem.dtype, even)
    return kind if kind != HALF or codes is None else "four" if problem.scheme == INT4 else "codes"


def tiled(problem: LinearProblem, session: Any, where: Target, tier: Tier, codes: Codes | None) -> Tiled:
    """How a problem of a tier runs on a target."""
    chosen = config(where, kind_of(problem, codes), tier, problem.group_size)
    tiles = triton.cdiv(problem.m, chosen.block["BLOCK_M"]) * triton.cdiv(problem.n, chosen.block["BLOCK_N"])
    split = tier.last <= GROUP_ROWS and not problem.heads
    operands = codes.dtype if codes is not None and codes.activations else problem.dtype
    found = parts(where, tiles, problem.k, chosen) if split else 1
    return Tiled(session, problem, chosen, where.expects(operands, chosen.unit), found)


def bind_linear(how: Tiled, where: Target, codes: Codes | None) -> Callable[..., torch.Tensor]:
    p = how.problem

    def operands(x: torch.Tensor, w: Any, bias: torch.Tensor | None) -> Operands:
        if codes is None:
            return Operands(readable(x).unsqueeze(1), dense(w), bias=bias)
        given, tokens = quantized(how.session, where, x, codes) if codes.activations else (readable(x), None)
        return Operands(given.unsqueeze(1), w.arrays["q"], w.arrays["scale"], tokens, bias)

    def linear(x: torch.Tensor, w: Any, *, bias: Any = None, out: Out = None) -> torch.Tensor:
        """x [T, I], w [O, I], dense or in codes with their scales, bias [O] -> x w^T + bias [T, O]; sums are made in
        float32, or of int8 codes exactly."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty((p.m, p.n), dtype=x.dtype, device=x.device) if out is None else out
        return how.run(operands(x, w, None if bias is None else gapless(bias)), out)

    return linear


def bind_heads(how: Tiled) -> Callable[..., torch.Tensor]:
    p = how.problem

    def head_linear(x: torch.Tensor, w: Any, *, out: Out = None) -> torch.Tensor:
        """x [T, H, I], w [H, O, I] -> per head x w^T [T, H, O]."""
        out = torch.empty((p.m, p.heads, p.n), dtype=x.dtype, device=x.device) if out is None else out
        return how.run(Operands(readable(x), dense(w)), out)

    return head_linear


def declines(problem: LinearProblem, where: Target, tier: Tier, scheme: str) -> str | None:
    """Why a kernel of a tier and a scheme does not take a problem."""
    if problem.dtype not in FLOATS:
        return f"accumulates in float32, for {', '.join(FLOATS)}, not {problem.dtype}"
    if problem.scheme != scheme:
        return f"is for weights of scheme {scheme}, not {problem.scheme}"
    if not tier.default and kind_of(problem, None) != HALF:
        return f"its tile is for numbers of 16 bits, and rows of a multiple of {ALIGNED} of them"
    return _declines_codes(problem, where) or tier.reason(problem.m)


def _declines_codes(problem: LinearProblem, where: Target) -> str | None:
    if problem.scheme == NONE:
        return None
    codes = codes_of(problem.scheme, where)
    if not codes.dtype:
        return f"{where.name} reads no floats of eight bits"
    if problem.scheme == INT4 and (not problem.group_size or problem.group_size % FEWEST_TERMS):
        return f"reads groups of a multiple of {FEWEST_TERMS} codes, not of {problem.group_size}"
    if problem.scheme != INT4 and problem.group_size:
        return f"reads a scale for each row, not for groups of {problem.group_size}"
    if not codes.activations:
        return None
    if codes.rule == "fp8" and problem.dtype == "float32":
        return "matrix instructions add products of eight-bit floats less exactly than float32 asks for"
    if codes.rule == "int8" and problem.k > LARGEST_SUM:
        return f"sums of int8 codes are exact for {LARGEST_SUM} terms at most, not {problem.k}"
    return None


def tier_recipe(where: Target, tier: Tier, op: str, scheme: str = NONE) -> Recipe:
    """The recipe of one tile, for `linear` with weights of a scheme or for `head_linear`."""
    codes = None if scheme == NONE else codes_of(scheme, where)

    def bind(problem: LinearProblem, session: Any) -> Callable[..., torch.Tensor]:
        how = tiled(problem, session, where, tier, codes)
        return bind_heads(how) if problem.heads else bind_linear(how, where, codes)

    layout, pack = (DENSE, None) if codes is None else (codes.packing.layout, codes.packing.pack)
    features = {"heads"} if op == "head_linear" else {"bias"} if codes is None else {"bias", "scheme"}
    stem = f"triton_{op}" if codes is None else f"triton_{op}_{scheme}"
    return recipe(
        f"{stem}_{tier.name}", op, bind, out=True, layout=layout, pack=pack, handles=frozenset(features),
        supports=lambda problem: declines(problem, where, tier, scheme), tunable=True,
        priority=TRITON if tier.default else ALTERNATE, options={"target": where.name},
    )  # fmt: skip


def recipes(where: Target) -> list[Recipe]:
    return [
        *(tier_recipe(where, tier, "linear") for tier in TIERS),
        *(tier_recipe(where, tier, "head_linear") for tier in CODE_TIERS),
        *(tier_recipe(where, tier, "linear", scheme) for scheme in LINEAR_SCHEMES for tier in CODE_TIERS),
    ]
