"""RMS norm over rows, alone and after a residual addition (Zhang and Sennrich, 2019): one program per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import NormProblem
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

WIDEST = 32768
"""Values of a row that one program holds in registers."""


@triton.jit
def norm_kernel(
    x_ptr, r_ptr, w_ptr, out_ptr, sum_ptr, x_stride, r_stride, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * x_stride + at, inside, 0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(r_ptr + row * r_stride + at, inside, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * width + at, x, inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps)
    w = tl.load(w_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * width + at, (wide * scale * w).to(x.dtype), inside)


def supports(problem: NormProblem) -> str | None:
    if problem.dtype == "float64":
        return "accumulates in float32, which is too narrow for float64"
    if problem.width > WIDEST:
        return f"holds a row of at most {WIDEST} values, not {problem.width}"
    return None


def config(width: int) -> Config:
    block = triton.next_power_of_2(width)
    return Config({"BLOCK": block}, num_warps=min(16, max(1, block // 512)), num_stages=1)


def bind_norm(problem: NormProblem, session: Any) -> Callable[..., torch.Tensor]:
    chosen = config(problem.width)

    def rms_norm(x: torch.Tensor, w: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, H], w [H] -> x / sqrt(mean(x^2) + eps) * w [T, H]."""
        x, out = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        flat = x.view(-1, problem.width) if x.is_contiguous() else x
        launch(
            session, norm_kernel, (flat.shape[0],), chosen, flat, flat, dense(w), out, out, flat.stride(0),
            flat.stride(0), problem.width, problem.eps, ADD=False,
        )  # fmt: skip
        return out

    return rms_norm


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its rows lie dense behind one another or at one stride, else a dense copy."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1) else x.contiguous()


def bind_add_norm(problem: NormProblem, session: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    chosen = config(problem.width)

    def add_rms_norm(
        x: torch.Tensor, r: torch.Tensor, w: Any, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, r [T, H], w [H] -> (rms_norm(x + r), x + r), the sum rounded before it is normed."""
        x, r = _rows(x), _rows(r)
        shape, kind = x.shape, dict[str, Any](dtype=x.dtype, device=x.device)
        normed, total = out or (torch.empty(shape, **kind), torch.empty(shape, **kind))
        launch(
            session, norm_kernel, (x.shape[0],), chosen, x, r, dense(w), normed, total, x.stride(0), r.stride(0),
            problem.width, problem.eps, ADD=True,
        )  # fmt: skip
        return normed, total

    return add_rms_norm


def recipes(where: Target) -> list[Recipe]:
    common: dict[str, Any] = {"out": True, "layout": DENSE, "priority": TRITON, "supports": supports}
    options = {"target": where.name}
    return [
        recipe("triton_rms_norm", "rms_norm", bind_norm, options=options, **common),
        recipe("triton_add_rms_norm", "add_rms_norm", bind_add_norm, options=options, **common),
    ]
