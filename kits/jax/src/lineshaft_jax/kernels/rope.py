"""Rotary embeddings. Angles are computed in the step, once for all layers: the compiler merges equal expressions."""

from __future__ import annotations

import jax.numpy as jnp

from lineshaft_contract.ops.rope import rope_frequencies
from lineshaft_contract.problems import RopeProblem
from lineshaft_jax.arrays import Array, widened
from lineshaft_jax.bound import Recipe, recipe, with_problem


def rotate(problem: RopeProblem, x: Array, cos: Array, sin: Array) -> Array:
    """x [T, H, D], cos and sin f32[T, 1, dim / 2] -> the first `dim` values of each head rotated, rounded once."""
    wide, half = widened(x), problem.dim // 2
    turned, rest = wide[..., : problem.dim], x[..., problem.dim :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if problem.interleaved else (turned[..., :half], turned[..., half:])
    first, second = a * cos - b * sin, b * cos + a * sin
    if problem.interleaved:
        joined = jnp.stack((first, second), -1).reshape(turned.shape)
    else:
        joined = jnp.concatenate((first, second), -1)
    return jnp.concatenate((joined.astype(x.dtype), rest), -1)


def rope(problem: RopeProblem, q: Array, k: Array, positions: Array) -> tuple[Array, Array]:
    """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated."""
    frequencies = jnp.asarray(rope_frequencies(problem), jnp.float32)
    angles = widened(positions)[:, None, None] * frequencies
    cos, sin = problem.attention_factor * jnp.cos(angles), problem.attention_factor * jnp.sin(angles)
    return rotate(problem, q, cos, sin), rotate(problem, k, cos, sin)


def supports(problem: RopeProblem) -> str | None:
    known = ("none", "linear", "llama3", "yarn")
    return None if problem.scaling.kind in known else f"does not know rope scaling {problem.scaling.kind!r}"


def recipes() -> list[Recipe]:
    handles = frozenset({"interleaved", "attention_factor"})
    return [recipe("xla_rope", "rope", with_problem(rope), handles=handles, supports=supports)]
