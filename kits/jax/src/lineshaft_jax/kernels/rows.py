"""Row-wise kernels: add, concat, gated activations, row gathers and the embedding lookup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lineshaft_contract.problems import EmbedProblem
from lineshaft_jax.arrays import Array, widened
from lineshaft_jax.bound import DENSE, Recipe, dense, recipe, stateless, with_problem


def add(x: Array, y: Array) -> Array:
    """x, y [..., W] -> x + y."""
    return x + y


def concat(xs: Sequence[Array], dim: int) -> Array:
    """Arrays that agree in every dim but `dim`, joined along it."""
    return jnp.concatenate(list(xs), dim)


def silu_mul(x: Array) -> Array:
    """x [T, 2F], gate first -> silu(gate) * up [T, F]."""
    gate, up = jnp.split(widened(x), 2, -1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)


def gelu_mul(x: Array) -> Array:
    """x [T, 2F], gate first -> gelu(gate) * up [T, F], with the tanh approximation."""
    gate, up = jnp.split(widened(x), 2, -1)
    return (jax.nn.gelu(gate, approximate=True) * up).astype(x.dtype)


def gather_rows(x: Array, rows: Array) -> Array:
    """x [T, H], rows int32[R] -> x[rows] [R, H]."""
    return x[rows]


def merge_rows(x: Array, embeds: Array, source: Array) -> Array:
    """x [T, H], embeds [M, H], source int32[T] -> embeds[source[t]] where source[t] >= 0, else x[t]."""
    return jnp.where((source >= 0)[:, None], embeds[jnp.maximum(source, 0)], x)


def embed(problem: EmbedProblem, ids: Array, table: Any, vocab_start: Any) -> Array:
    """ids int32[T], table [V, H], vocab_start int32[1] -> table[ids - vocab_start] * scale [T, H]; 0 outside the
    shard."""
    rows = dense(table)
    local = ids - dense(vocab_start)
    inside = (local >= 0) & (local < rows.shape[0])
    found = rows[jnp.where(inside, local, 0)]
    found = found if problem.scale == 1.0 else (widened(found) * problem.scale).astype(found.dtype)
    return jnp.where(inside[:, None], found, 0)


def recipes() -> list[Recipe]:
    plain: list[Callable[..., Array]] = [add, concat, silu_mul, gelu_mul, gather_rows, merge_rows]
    return [
        *(recipe(f"xla_{run.__name__}", run.__name__, stateless(run)) for run in plain),
        recipe("xla_embed", "embed", with_problem(embed), layout=DENSE, handles=frozenset({"scale"})),
    ]
