"""From logits to token ids: masks and biases, argmax, sampling by inverse CDF, log-probabilities. All in float32."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax

from lineshaft.contract.problems import SampleProblem
from lineshaft_jax.arrays import Array, widened
from lineshaft_jax.bound import Recipe, recipe, stateless, with_problem

Params = Mapping[str, Array]


def argmax(logits: Array) -> Array:
    """logits [R, V] -> int32[R]; the lowest index wins a tie; -1 for a row with a NaN or nothing above -inf."""
    wide = widened(logits)
    best = jnp.argmax(wide, -1).astype(jnp.int32)
    return jnp.where(wide.max(-1) > -jnp.inf, best, -1)


def ranked(x: Array, *others: Array) -> tuple[Array, ...]:
    """f32 x [R, V] -> (ids int32[R, V] in descending order of x, `others` in that order); ties to the lowest id."""
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return tuple(lax.sort((-x, ids, *others), dimension=1, is_stable=True, num_keys=1)[1:])


def kept_tokens(x: Array, weights: Array, params: Params) -> Array:
    """f32 x [R, V] and weights f32[R, V], 0 where x is -inf -> bool[R, V]: kept by top-k, then by top-p.

    top_p keeps each token before which, in descending order, less than top_p of what top_k kept has been gathered.
    """
    top_k, top_p = params["top_k"][:, None], params["top_p"][:, None]
    order, ordered = ranked(x, weights)
    kept = (lax.broadcasted_iota(jnp.int32, x.shape, 1) < top_k) | (top_k <= 0)
    mass = jnp.where(kept, ordered, 0.0)
    gathered = jnp.cumsum(mass, -1)
    kept &= (gathered - mass < top_p * gathered[:, -1:]) | (top_p <= 0) | (top_p >= 1)
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.zeros(x.shape, bool).at[row, order].set(kept, unique_indices=True)


def inverse_cdf(weights: Array, kept: Array, u: Array) -> Array:
    """weights f32[R, V] in id order, kept bool[R, V], u f32[R] in [0, 1) -> int32[R]: the first kept id whose running
    sum exceeds u * total, or the last kept one."""
    running = jnp.cumsum(jnp.where(kept, weights, 0.0), -1)
    reached = kept & (running > u[:, None] * running[:, -1:])
    ids = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    last = jnp.max(jnp.where(kept, ids, 0), -1)
    return jnp.minimum(jnp.min(jnp.where(reached, ids, weights.shape[1]), -1), last)


def sample(logits: Array, params: Params, u: Array) -> Array:
    """logits [R, V], u f32[R, 1] -> int32[R]; temperature 0 is argmax, -1 stands for a row with NaN or nothing kept.

    Sorting is left out in a step without a row that asks for top_k or top_p.
    """
    x, best = widened(logits), argmax(logits)
    heat = jnp.where(params["temperature"] > 0, params["temperature"], 1.0)[:, None]
    weights = jnp.exp((x - x.max(-1, keepdims=True)) / heat)
    sorting = (params["top_k"] > 0) | ((params["top_p"] > 0) & (params["top_p"] < 1))
    kept = lax.cond(jnp.any(sorting), lambda: kept_tokens(x, weights, params), lambda: jnp.ones(x.shape, bool))
    kept &= (x > -jnp.inf) & (weights >= params["min_p"][:, None])
    drawn = inverse_cdf(weights, kept, u[:, 0])
    return jnp.where((params["temperature"] > 0) & (best >= 0), drawn, best)


def logprobs(problem: SampleProblem, logits: Array, ids: Array, k: int) -> tuple[Array, Array, Array]:
    """logits [R, V], ids int32[R] -> (chosen f32[R], top ids int32[R, k], top f32[R, k]); natural logarithms, largest
    first, ties to the lowest id."""
    x = widened(logits)
    peak = x.max(-1, keepdims=True)
    lowered = x - jnp.where(peak == -jnp.inf, 0.0, peak)
    logs = lowered - jnp.log(jnp.exp(lowered).sum(-1, keepdims=True))
    chosen = jnp.take_along_axis(logs, jnp.maximum(ids, 0)[:, None], 1)[:, 0]
    top = lax.top_k(jnp.where(x == 0, 0.0, x), k)[1]  # which ranks 0.0 above -0.0
    return chosen, top, jnp.take_along_axis(logs, top, 1)


def apply_logits(logits: Array, *, mask: Array | None = None, bias: Array | None = None) -> Array:
    """logits [R, V], mask uint32[R, ceil(V / 32)] (bit set = allowed), bias f32[R, V] -> logits with both applied."""
    wide = widened(logits) if bias is None else widened(logits) + bias
    if mask is not None:
        bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        wide = jnp.where(bits.reshape(len(mask), -1)[:, : logits.shape[1]] == 1, wide, -jnp.inf)
    return wide.astype(logits.dtype)


def recipes() -> list[Recipe]:
    return [
        recipe("xla_argmax", "argmax", stateless(argmax)),
        recipe("xla_sample", "sample", stateless(sample)),
        recipe("xla_logprobs", "logprobs", with_problem(logprobs)),
        recipe("xla_apply_logits", "apply_logits", stateless(apply_logits), handles=frozenset({"mask", "bias"})),
    ]
