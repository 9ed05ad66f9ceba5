"""Rows by AITER, AMD's library of kernels, where it is installed. Importing it compiles, so that only a plan that has
chosen one of these imports it.

Entry points: `aiter.rms_norm` and `aiter.silu_and_mul`, as of its sources of August 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lineshaft_contract.problems import NormProblem, PointwiseProblem, Problem
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe
from lineshaft_triton.priority import DECLARED
from lineshaft_triton.targets import Target

PACKAGE = "aiter"
BUILT_FOR = ("gfx942", "gfx950")


def bind_norm(problem: NormProblem, session: Any) -> Callable[..., torch.Tensor]:
    from aiter import rms_norm

    def run(x: torch.Tensor, w: Any) -> torch.Tensor:
        """x [..., W], w [W] -> x / sqrt(mean(x^2) + eps) * w."""
        return rms_norm(x.reshape(-1, problem.width).contiguous(), dense(w), problem.eps).view(x.shape)

    return run


def bind_silu_mul(problem: PointwiseProblem, session: Any) -> Callable[..., torch.Tensor]:
    from aiter import silu_and_mul

    def run(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, 2F] -> silu(x[:, :F]) * x[:, F:] [T, F]."""
        if out is None:
            out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
        silu_and_mul(out, x.contiguous())
        return out

    return run


def recipes(where: Target) -> list[Recipe]:
    def supports(problem: Problem) -> str | None:
        if where.name not in BUILT_FOR:
            return f"is built for {' and '.join(BUILT_FOR)}, not for {where.name}"
        if problem.dtype not in ("bfloat16", "float16"):
            return f"computes in bfloat16 and float16, not in {problem.dtype}"
        return None

    return [
        recipe("aiter_rms_norm", "rms_norm", bind_norm, layout=DENSE, priority=DECLARED, supports=supports),
        recipe("aiter_silu_mul", "silu_mul", bind_silu_mul, out=True, priority=DECLARED, supports=supports),
    ]
