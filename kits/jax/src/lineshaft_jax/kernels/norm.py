"""RMS norm, alone and after a residual addition; both accumulate in float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from lineshaft_contract.problems import NormProblem
from lineshaft_jax.arrays import Array, widened
from lineshaft_jax.bound import DENSE, Recipe, dense, recipe, with_problem


def rms_norm(problem: NormProblem, x: Array, w: Any) -> Array:
    """x [..., W], w [W] -> x / sqrt(mean(x^2) + eps) * w, rounded once."""
    wide = widened(x)
    scale = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + problem.eps)
    return (wide * scale * widened(dense(w))).astype(x.dtype)


def add_rms_norm(problem: NormProblem, x: Array, r: Array, w: Any) -> tuple[Array, Array]:
    """x, r [..., W] -> (rms_norm(x + r), x + r)."""
    total = x + r
    return rms_norm(problem, total, w), total


def recipes() -> list[Recipe]:
    return [
        recipe("xla_rms_norm", "rms_norm", with_problem(rms_norm), layout=DENSE),
        recipe("xla_add_rms_norm", "add_rms_norm", with_problem(add_rms_norm), layout=DENSE),
    ]
