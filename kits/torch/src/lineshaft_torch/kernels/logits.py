"""From logits to token ids: edits and masks, argmax, sampling by inverse CDF, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lineshaft_contract.problems import SampleProblem
from lineshaft_torch.bound import Recipe, recipe, stateless, with_problem

Params = Mapping[str, torch.Tensor]


def argmax(logits: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """logits [R, V] -> int32[R]; the lowest index wins a tie; -1 for a row with a NaN or nothing above -inf."""
    largest, best = logits.max(-1)  # a NaN counts as the largest
    best = torch.where(largest > -torch.inf, best, -1)
    return best.int() if out is None else out.copy_(best)


def probabilities(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """logits [R, V], temperature f32[R] (0 counts as 1) -> softmax(logits / temperature) in float64."""
    heat = torch.where(temperature > 0, temperature, 1.0).double()
    return torch.softmax(logits.double() / heat[:, None], -1)


def kept_tokens(ranked: torch.Tensor, params: Params) -> torch.Tensor:
    """ranked f64[R, V]: probabilities, largest first -> bool[R, V]: kept by top-k, then top-p, then min-p.

    top_p keeps the shortest run of tokens whose mass, within top-k, reaches top_p; min_p compares with the largest.
    """
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    top_k, top_p, min_p = params["top_k"][:, None], params["top_p"][:, None].double(), params["min_p"][:, None].double()
    kept = (rank < top_k) | (top_k <= 0)
    mass = torch.where(kept, ranked, 0.0)
    mass = mass / mass.sum(-1, keepdim=True)
    kept &= (mass.cumsum(-1) - mass < top_p) | (top_p <= 0) | (top_p >= 1)
    return kept & (mass >= min_p * mass[:, :1])


def typical_tokens(probs: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """probs f64[R, V] in id order, typical_p f32[R] -> bool[R, V]: the tokens whose surprise lies nearest to the
    entropy, until typical_p of the mass is gathered."""
    shares = probs / probs.sum(-1, keepdim=True)
    surprise = -shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
    distance = (surprise - (shares * surprise).sum(-1, keepdim=True)).abs().masked_fill(probs == 0, torch.inf)
    order = distance.sort(stable=True, dim=-1).indices
    mass = shares.gather(1, order)
    most = typical_p[:, None].double()
    kept = (mass.cumsum(-1) - mass < most) | (most <= 0) | (most >= 1)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def inverse_cdf(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """weights f64[R, V] in id order, 0 where not kept, u [R] in [0, 1) -> the first id whose running sum exceeds
    u * total, among kept ids."""
    running = weights.cumsum(-1)
    ids = torch.searchsorted(running, u.double()[:, None] * running[:, -1:], right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(ids, last)


def sample(
    problem: SampleProblem, logits: torch.Tensor, params: Params, u: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """logits [R, V], u f32[R, 1] -> int32[R]; temperature 0 is argmax, -1 stands for a row with NaN or nothing kept."""
    probs = probabilities(logits, params["temperature"])
    ranked, order = probs.sort(stable=True, dim=-1, descending=True)
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, kept_tokens(ranked, params))
    weights = torch.where(kept, probs, 0.0)
    if problem.typical:
        weights = torch.where(typical_tokens(weights, params["typical_p"]), weights, 0.0)
    drawn = inverse_cdf(weights, u[:, 0])
    ids = torch.where(params["temperature"] > 0, drawn, logits.argmax(-1))
    broken = logits.isnan().any(-1) | (logits == -torch.inf).all(-1)
    ids = torch.where(broken, -1, ids)
    return ids.int() if out is None else out.copy_(ids)


def logprobs(
    problem: SampleProblem, logits: torch.Tensor, ids: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [R, V], ids int32[R] -> (chosen f32[R], top ids int32[R, k], top f32[R, k]); natural logarithms, largest
    first, ties to the lowest id."""
    logs = torch.log_softmax(logits.double(), -1)
    chosen = logs.gather(1, ids.long().clamp(min=0)[:, None])[:, 0]
    top, order = logs.sort(stable=True, dim=-1, descending=True)
    return chosen.float(), order[:, :k].int(), top[:, :k].float()


def apply_logits(
    logits: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    edit_ids: torch.Tensor | None = None,
    edit_scale: torch.Tensor | None = None,
    edit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits [R, V] -> x / scale where x > 0, else x * scale (0: 1), plus bias, at edit_ids int32[R, K] (V: nothing);
    then -inf where the bit of mask uint32[R, ceil(V / 32)] is clear."""
    result = logits.clone()
    if edit_ids is not None and edit_scale is not None and edit_bias is not None:
        result = edited(logits, edit_ids.long(), edit_scale, edit_bias)
    if mask is None:
        return result
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = (mask.view(torch.int32)[:, :, None] >> bits) & 1
    return result.masked_fill_(allowed.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def edited(logits: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A copy of logits [R, V] with edits at ids int64[R, K]; id V falls into a column that is cut off."""
    wider = torch.nn.functional.pad(logits, (0, 1))
    old = wider.gather(1, ids).to(torch.promote_types(logits.dtype, torch.float32))
    scale = torch.where(scale == 0, 1.0, scale)
    new = torch.where(old > 0, old / scale, old * scale) + bias
    return wider.scatter_(1, ids, new.to(logits.dtype))[:, :-1].contiguous()


def recipes() -> list[Recipe]:
    return [
        recipe("torch_argmax", "argmax", stateless(argmax), out=True),
        recipe("torch_sample", "sample", with_problem(sample), out=True, handles=frozenset({"typical"})),
        recipe("torch_logprobs", "logprobs", with_problem(logprobs)),
        recipe("torch_apply_logits", "apply_logits", stateless(apply_logits), handles=frozenset({"mask", "edits"})),
    ]
