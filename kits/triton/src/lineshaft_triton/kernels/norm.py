"""RMS norm over rows, alone and after a residual addition (Zhang and Sennrich, 2019).

A program takes several narrow rows, such as those of heads, or a wide one, and holds them in registers. A row that is
too wide for that is read twice, block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import NormProblem
from lineshaft_torch.bound import DENSE, Recipe, recipe
from lineshaft_triton.kernels.rowwise import common_fields, empty, gapless, strided, tiles
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.targets import Target

HELD = 8192
"""Values of a row that a program holds at most."""
VALUES = 4096
"""Values of narrow rows that it takes together."""


@triton.jit
def load_total(x_row, r_row, at, inside, ADD: tl.constexpr):
    """x, or x + r rounded to their dtype."""
    x = tl.load(x_row + at, inside, 0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(r_row + at, inside, 0.0).to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def norm_kernel(
    x_ptr, r_ptr, w_ptr, out_ptr, sum_ptr, rows, x_inner, x_outer, x_step, r_inner, r_outer, r_step, width, eps,
    ADD: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x_row = x_ptr + (row // x_inner) * x_outer + (row % x_inner) * x_step
    r_row = r_ptr + (row // r_inner) * r_outer + (row % r_inner) * r_step
    out_row, sum_row = out_ptr + row * width, sum_ptr + row * width
    at = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        inside = (row < rows) & (at < width)
        x = load_total(x_row, r_row, at, inside, ADD)
        if ADD:
            tl.store(sum_row + at, x, inside)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)[:, None]
        w = tl.load(w_ptr + at, at < width, 0.0).to(tl.float32)
        tl.store(out_row + at, (wide * scale * w).to(x.dtype), inside)
    else:
        squares = tl.full((ROWS, BLOCK), 0, tl.float32)
        for start in range(0, width, BLOCK):
            inside = (row < rows) & (start + at < width)
            x = load_total(x_row, r_row, start + at, inside, ADD)
            if ADD:
                tl.store(sum_row + start + at, x, inside)
            squares += x.to(tl.float32) * x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
        for start in range(0, width, BLOCK):
            inside = (row < rows) & (start + at < width)
            x = load_total(x_row, r_row, start + at, inside, ADD)
            w = tl.load(w_ptr + start + at, start + at < width, 0.0).to(tl.float32)
            tl.store(out_row + start + at, (x.to(tl.float32) * scale * w).to(x.dtype), inside)


def run_norm(
    problem: NormProblem,
    session: Any,
    config: Config,
    x: torch.Tensor,
    r: torch.Tensor | None,
    w: Any,
    normed: torch.Tensor,
    total: torch.Tensor,
) -> None:
    (x, x_rows), (r, r_rows) = strided(x), strided(x if r is None else r)
    rows = normed.numel() // problem.width
    launch(
        session, norm_kernel, (triton.cdiv(rows, config.block["ROWS"]),), config, x, r, gapless(w), normed, total, rows,
        *x_rows, *r_rows, problem.width, problem.eps, ADD=total is not normed,
        WHOLE=config.block["BLOCK"] >= problem.width,
    )  # fmt: skip


def bind_norm(where: Target, problem: NormProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = tiles(problem.rows, problem.width, where, values=VALUES, block=HELD)

    def rms_norm(x: torch.Tensor, w: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., H], w [H] -> x / sqrt(mean(x^2) + eps) * w [..., H]."""
        out = empty(out, x.shape, x)
        run_norm(problem, session, config, x, None, w, out, out)
        return out

    return rms_norm


def bind_add_norm(
    where: Target, problem: NormProblem, session: Any
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    config = tiles(problem.rows, problem.width, where, values=VALUES, block=HELD)

    def add_rms_norm(
        x: torch.Tensor, r: torch.Tensor, w: Any, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, r [..., H], w [H] -> (rms_norm(x + r), x + r), the sum rounded before it is normed."""
        normed, total = out or (empty(None, x.shape, x), empty(None, x.shape, x))
        run_norm(problem, session, config, x, r, w, normed, total)
        return normed, total

    return add_rms_norm


def recipes(where: Target) -> list[Recipe]:
    common = common_fields(where)
    return [
        recipe("triton_rms_norm", "rms_norm", partial(bind_norm, where), layout=DENSE, **common),
        recipe("triton_add_rms_norm", "add_rms_norm", partial(bind_add_norm, where), layout=DENSE, **common),
    ]
