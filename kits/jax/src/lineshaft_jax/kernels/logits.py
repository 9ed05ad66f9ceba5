"""From logits to token ids: edits and masks, argmax, sampling by inverse CDF, log-probabilities. All in float32."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax

from lineshaft_contract.problems import SampleProblem
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
    return in_id_order(order, kept)


def typical_tokens(weights: Array, kept: Array, typical_p: Array) -> Array:
    """weights f32[R, V], kept bool[R, V], typical_p f32[R] -> bool[R, V]: of what is kept, the tokens whose surprise
    lies nearest to the entropy, until typical_p of the mass is gathered."""
    mass = jnp.where(kept, weights, 0.0)
    shares = mass / mass.sum(-1, keepdims=True)
    surprise = -jnp.log(jnp.maximum(shares, jnp.finfo(jnp.float32).tiny))
    distance = jnp.abs(surprise - (shares * surprise).sum(-1, keepdims=True))
    order, ordered = ranked(-jnp.where(mass > 0, distance, jnp.inf), shares)
    most = typical_p[:, None]
    near = (jnp.cumsum(ordered, -1) - ordered < most) | (most <= 0) | (most >= 1)
    return kept & in_id_order(order, near)


def in_id_order(order: Array, ranked_flags: Array) -> Array:
    """bool[R, V] by rank -> by id, where `order` int32[R, V] has the id of each rank."""
    row = lax.broadcasted_iota(jnp.int32, order.shape, 0)
    return jnp.zeros(order.shape, bool).at[row, order].set(ranked_flags, unique_indices=True)


def inverse_cdf(weights: Array, kept: Array, u: Array) -> Array:
    """weights f32[R, V] in id order, kept bool[R, V], u f32[R] in [0, 1) -> int32[R]: the first kept id whose running
    sum exceeds u * total, or the last kept one."""
    running = jnp.cumsum(jnp.where(kept, weights, 0.0), -1)
    reached = kept & (running > u[:, None] * running[:, -1:])
    ids = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    last = jnp.max(jnp.where(kept, ids, 0), -1)
    return jnp.minimum(jnp.min(jnp.where(reached, ids, weights.shape[1]), -1), last)


def sample(problem: SampleProblem, logits: Array, params: Params, u: Array) -> Array:
    """logits [R, V], u f32[R, 1] -> int32[R]; temperature 0 is argmax, -1 stands for a row with NaN or nothing kept.

    Sorting is left out in a step without a row that asks for top_k or top_p.
    """
    x, best = widened(logits), argmax(logits)
    heat = jnp.where(params["temperature"] > 0, params["temperature"], 1.0)[:, None]
    weights = jnp.exp((x - x.max(-1, keepdims=True)) / heat)
    sorting = (params["top_k"] > 0) | ((params["top_p"] > 0) & (params["top_p"] < 1))
    kept = lax.cond(jnp.any(sorting), lambda: kept_tokens(x, weights, params), lambda: jnp.ones(x.shape, bool))
    kept &= (x > -jnp.inf) & (weights >= params["min_p"][:, None])
    if problem.typical:
        kept = typical_tokens(weights, kept, params["typical_p"])
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


def apply_logits(
    logits: Array,
    *,
    mask: Array | None = None,
    edit_ids: Array | None = None,
    edit_scale: Array | None = None,
    edit_bias: Array | None = None,
) -> Array:
    """logits [R, V] -> x / scale where x > 0, else x * scale (0: 1), plus bias, at edit_ids int32[R, K] (V: nothing);
    then -inf where the bit of mask uint32[R, ceil(V / 32)] is clear."""
    out = logits
    if edit_ids is not None and edit_scale is not None and edit_bias is not None:
        row = lax.broadcasted_iota(jnp.int32, edit_ids.shape, 0)
        old = widened(logits.at[row, edit_ids].get(mode="fill", fill_value=0))
        scale = jnp.where(edit_scale == 0, 1.0, edit_scale)
        new = jnp.where(old > 0, old / scale, old * scale) + edit_bias
        out = logits.at[row, edit_ids].set(new.astype(logits.dtype), mode="drop")
    if mask is not None:
        bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        out = jnp.where(bits.reshape(len(mask), -1)[:, : logits.shape[1]] == 1, out, -jnp.inf).astype(logits.dtype)
    return out


def recipes() -> list[Recipe]:
    return [
        recipe("xla_argmax", "argmax", stateless(argmax)),
        recipe("xla_sample", "sample", with_problem(sample), handles=frozenset({"typical"})),
        recipe("xla_logprobs", "logprobs", with_problem(logprobs)),
        recipe("xla_apply_logits", "apply_logits", stateless(apply_logits), handles=frozenset({"mask", "edits"})),
    ]
