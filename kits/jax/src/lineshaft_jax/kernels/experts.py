"""Mixture of experts with static, lossless capacity: routing, sorting rows by expert, their MLPs, and the sum.

`expert_mlp` has no kernel of its own here: its default decomposition calls these, or better ones of a backend.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lineshaft_contract.problems import ExpertProblem, RouterProblem
from lineshaft_jax.arrays import Array, widened
from lineshaft_jax.bound import DENSE, Recipe, dense, recipe, stateless, with_problem
from lineshaft_jax.kernels.linear import product
from lineshaft_jax.kernels.logits import ranked
from lineshaft_jax.kernels.ragged import Blocks

EXPERT_FEATURES = frozenset({"bias", "swiglu_alpha", "swiglu_limit"})

ROWS = 64
"""Rows of one expert that are multiplied at a time."""


def router_topk(problem: RouterProblem, logits: Array) -> tuple[Array, Array]:
    """logits [T, E] -> (ids int32[T, k], weights f32[T, k], unrounded), largest first, ties to the lowest id."""
    x = widened(logits)
    ids = ranked(jnp.where(eligible(problem, x), x, -jnp.inf))[0][:, : problem.k]
    before = problem.softmax == "before"
    probs = jnp.take_along_axis(jax.nn.softmax(x, -1) if before else x, ids, 1)
    probs = probs if before else jax.nn.softmax(probs, -1)
    if problem.renormalise:
        probs = probs / probs.sum(-1, keepdims=True)
    return ids, probs * problem.scale


def eligible(problem: RouterProblem, x: Array) -> Array:
    """bool[T, E]: experts of the groups with the largest logits; all of them without groups."""
    if not problem.groups:
        return jnp.ones(x.shape, bool)
    chosen = ranked(x.reshape(x.shape[0], problem.groups, -1).max(-1))[0][:, : problem.group_top]
    group = jnp.arange(problem.experts) // (problem.experts // problem.groups)
    return (chosen[:, None] == group[:, None]).any(-1)


def moe_dispatch(x: Array, ids: Array, expert_map: Any, local: int) -> tuple[Array, Array, Array]:
    """x [T, H], ids int32[T, k], expert_map int32[E] -> (rows [T * k, H] by local expert, offsets int32[local + 1],
    source int32[T * k]); rows for experts elsewhere come last and are 0."""
    expert = dense(expert_map)[ids.reshape(-1)]
    expert = jnp.where(expert < 0, local, expert)
    assignment = jnp.arange(expert.shape[0], dtype=jnp.int32)
    expert, source = lax.sort((expert, assignment), is_stable=True, num_keys=1)
    offsets = jnp.sum(expert < jnp.arange(local + 1)[:, None], -1, dtype=jnp.int32)
    rows = jnp.where((expert < local)[:, None], x[source // ids.shape[1]], 0)
    return rows, offsets, source


def gated_mlp(problem: ExpertProblem, x: Array, w13: Array, w2: Array, first: Array, second: Array) -> Array:
    """x [n, H], w13 [2F, H], w2 [H, F], biases [2F] and [H] or [1] -> [n, H]; the hidden activation is rounded once."""
    gate, up = jnp.split(product(x, w13) + first, 2, -1)
    hidden = activate(problem, gate, up).astype(x.dtype)
    return (product(hidden, w2) + second).astype(x.dtype)


def activate(problem: ExpertProblem, gate: Array, up: Array) -> Array:
    """gate, up [n, F] -> what the problem's activation makes of them [n, F]."""
    if problem.activation == "swigluoai":
        gate, up = jnp.minimum(gate, problem.swiglu_limit), jnp.clip(up, -problem.swiglu_limit, problem.swiglu_limit)
        return gate * jax.nn.sigmoid(problem.swiglu_alpha * gate) * (up + 1)
    return (jax.nn.silu(gate) if problem.activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up


def grouped_mlp(
    problem: ExpertProblem, x: Array, w13: Any, w2: Any, offsets: Array, *, w13_bias: Any = None, w2_bias: Any = None
) -> Array:
    """x [C, H], w13 [L, 2F, H], w2 [L, H, F], offsets int32[L + 1], biases [L, 2F] and [L, H] -> [C, H], in blocks of
    one expert's rows."""
    none = jnp.zeros((problem.local, 1), x.dtype)
    biases = (none if bias is None else dense(bias) for bias in (w13_bias, w2_bias))
    parts = dense(w13), dense(w2), *map(widened, biases)
    blocks = Blocks(offsets, x.shape[0], min(ROWS, x.shape[0]))

    def run(expert: Array, begin: Array) -> Array:
        return gated_mlp(problem, blocks.cut(x, begin), *(part[expert] for part in parts))

    owned = jnp.arange(x.shape[0]) < offsets[-1]
    return jnp.where(owned[:, None], blocks.map(run), 0)


def moe_combine(rows: Array, source: Array, probs: Array) -> Array:
    """rows [T * k, H], source int32[T * k], probs f32[T, k] -> the weighted sum of each token's rows [T, H]."""
    place = jnp.zeros_like(source).at[source].set(jnp.arange(source.shape[0], dtype=source.dtype))
    parts = widened(rows[place]).reshape(*probs.shape, -1)
    return (probs[..., None] * parts).sum(1).astype(rows.dtype)


def supports(problem: ExpertProblem) -> str | None:
    known = ("silu", "gelu", "swigluoai")
    return None if problem.activation in known else f"knows the activations {known}, not {problem.activation!r}"


def recipes() -> list[Recipe]:
    return [
        recipe("xla_router_topk", "router_topk", with_problem(router_topk), handles=frozenset({"groups"})),
        recipe("xla_moe_dispatch", "moe_dispatch", stateless(moe_dispatch)),
        recipe(
            "xla_grouped_mlp", "grouped_mlp", with_problem(grouped_mlp), layout=DENSE, supports=supports,
            handles=EXPERT_FEATURES,
        ),
        recipe("xla_moe_combine", "moe_combine", stateless(moe_combine)),
    ]  # fmt: skip
