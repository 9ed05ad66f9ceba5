"""RMS norm, alone and after a residual addition; both accumulate in float32 (float64 for float64)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lineshaft_contract.problems import NormProblem
from lineshaft_torch.arrays import accumulator
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe

Out = torch.Tensor | None


def rms_norm(width: int, eps: torch.Tensor, x: torch.Tensor, w: Any, *, out: Out = None) -> torch.Tensor:
    """x [T, H], w [H] -> x / sqrt(mean(x^2) + eps) * w, rounded once. `eps` [1] is of the accumulation dtype."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=eps.dtype)
    scale = torch.addcmul(eps, norm, norm, value=1 / width).rsqrt_()
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    return torch.mul(scale * x, dense(w), out=out)


def add_rms_norm(
    width: int,
    eps: torch.Tensor,
    x: torch.Tensor,
    r: torch.Tensor,
    w: Any,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, r [T, H] -> (rms_norm(x + r), x + r); the sum is rounded before it is normed."""
    normed, total = out or (None, None)
    total = torch.add(x, r, out=total)
    return rms_norm(width, eps, total, w, out=normed), total


def _bind(run: Any, problem: NormProblem, session: Any) -> Any:
    dtype = accumulator(getattr(torch, problem.dtype))
    return partial(run, problem.width, torch.tensor([problem.eps], dtype=dtype, device=session.device))


def recipes() -> list[Recipe]:
    return [
        recipe("torch_rms_norm", "rms_norm", partial(_bind, rms_norm), out=True, layout=DENSE),
        recipe("torch_add_rms_norm", "add_rms_norm", partial(_bind, add_rms_norm), out=True, layout=DENSE),
    ]
