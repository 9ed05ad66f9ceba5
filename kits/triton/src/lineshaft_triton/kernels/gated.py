"""Gated activations and addition: one read of each value, one write."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import PointwiseProblem
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_triton.kernels.rowwise import common_fields, empty, grid_over, strided, tiles
from lineshaft_triton.launch import launch
from lineshaft_triton.targets import Target


@triton.jit
def gated_kernel(x_ptr, out_ptr, rows, x_stride, width, GELU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < width)
    gate = tl.load(x_ptr + row * x_stride + at, inside, 0.0)
    up = tl.load(x_ptr + row * x_stride + width + at, inside, 0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    # (1 + tanh(z)) / 2 is the logistic function of 2 z; where exp overflows, the quotient is 0
    turn = wide * (1.5957691216057308 + 0.07135481627260025 * wide * wide) if GELU else wide
    tl.store(out_ptr + row * width + at, (wide / (1.0 + tl.exp(-turn)) * up).to(gate.dtype), inside)


@triton.jit
def add_kernel(
    x_ptr, y_ptr, out_ptr, rows, x_inner, x_outer, x_step, y_inner, y_outer, y_step, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < width)
    x = tl.load(x_ptr + (row // x_inner) * x_outer + (row % x_inner) * x_step + at, inside, 0.0)
    y = tl.load(y_ptr + (row // y_inner) * y_outer + (row % y_inner) * y_step + at, inside, 0.0)
    tl.store(out_ptr + row * width + at, (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype), inside)


def bind_gated(gelu: bool, where: Target, problem: PointwiseProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = tiles(problem.rows, problem.width, where)

    def gated(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, 2F] = (gate, up) -> act(gate) * up [T, F]; act is silu, z / (1 + exp(-z)), or gelu by its tanh
        approximation, z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))) (Hendrycks and Gimpel, 2016)."""
        x, (_, stride, _) = strided(x)
        rows, width = x.shape[0], x.shape[1] // 2
        out = empty(out, (rows, width), x)
        launch(session, gated_kernel, grid_over(rows, width, config), config, x, out, rows, stride, width, GELU=gelu)
        return out

    return gated


def bind_add(where: Target, problem: PointwiseProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = tiles(problem.rows, problem.width, where)

    def add(x: torch.Tensor, y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x, y [..., W] -> x + y [..., W]."""
        out = empty(out, x.shape, x)
        (x, x_rows), (y, y_rows) = strided(x), strided(y)
        width = x.shape[-1]
        rows = x.numel() // width
        launch(session, add_kernel, grid_over(rows, width, config), config, x, y, out, rows, *x_rows, *y_rows, width)
        return out

    return add


def recipes(where: Target) -> list[Recipe]:
    common = common_fields(where)
    return [
        recipe("triton_silu_mul", "silu_mul", partial(bind_gated, False, where), **common),
        recipe("triton_gelu_mul", "gelu_mul", partial(bind_gated, True, where), **common),
        recipe("triton_add", "add", partial(bind_add, where), **common),
    ]
