"""From logits to token ids on the device: argmax, sampling and log-probabilities, without a sort and in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lineshaft_contract.problems import SampleProblem
from lineshaft_neuron.kernels.bound import neuron_recipe
from lineshaft_neuron.kernels.ranking import UNUSED_BITS, above, first, iota, largest, leading, reaching
from lineshaft_torch.bound import Recipe, stateless, with_problem

Params = Mapping[str, torch.Tensor]
EXACT_COUNTS = 2**24
"""Every whole number up to it is a float32."""


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> int32[R]; the lowest index wins a tie; -1 for a row with a NaN or nothing above -inf."""
    x = logits.float()
    top = x.amax(-1, keepdim=True)
    return torch.where(broken(x, top), -1, first(x == top))


def broken(x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """bool[R]: rows of x [R, V], with their largest values [R, 1], that have a NaN or nothing above -inf."""
    return x.isnan().any(-1) | (top[:, 0] == -torch.inf)


def kept_tokens(x: torch.Tensor, weights: torch.Tensor, params: Params, unused_bits: int) -> torch.Tensor:
    """x f32[R, V]: logits, weights f32[R, V]: exp of their scaled distance to the largest -> bool[R, V]: kept by top-k,
    top-p and min-p, and of a weight above 0.

    The first two keep leading tokens in descending order, and so do both together: those above the higher border.
    """
    top_k, top_p, min_p = (params[key][:, None] for key in ("top_k", "top_p", "min_p"))
    vocab, one = x.shape[1], torch.ones_like(x[:1])
    count = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).float()
    border = reaching(x, (one, count), unused_bits)
    at_border = torch.where(x == border, weights, 0.0).amax(-1, keepdim=True)
    mass = above(x, border, weights) + (count - above(x, border, one)) * at_border
    nucleus = torch.where((top_p <= 0) | (top_p >= 1), torch.inf, top_p * mass)
    border = torch.maximum(border, reaching(x, (weights, nucleus), unused_bits))
    kept = leading(x, border, (one, count), (weights, nucleus))
    return kept & (weights >= min_p) & (weights > 0)


def typical_tokens(scaled: torch.Tensor, weights: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """scaled f32[R, V]: logits over temperature, less their largest; weights f32[R, V]: their exp, 0 where not kept;
    typical_p f32[R] -> bool[R, V]: the tokens whose surprise lies nearest to the entropy."""
    kept, total = weights > 0, weights.sum(-1, keepdim=True)
    surprise = torch.where(kept, total.log() - scaled, 0.0)
    entropy = (weights * surprise).sum(-1, keepdim=True) / total
    nearness = torch.where(kept, -(surprise - entropy).abs(), -torch.inf)
    share = typical_p[:, None]
    measure = weights, torch.where((share <= 0) | (share >= 1), torch.inf, share * total)
    return leading(nearness, reaching(nearness, measure), measure)


def inverse_cdf(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """weights f32[R, V] in id order, 0 where not kept, u f32[R, 1] in [0, 1) -> int32[R]: the first kept id whose
    running sum exceeds u * total, or the last; -1 without one."""
    running, kept = weights.cumsum(-1), weights > 0
    last = torch.where(kept, iota(weights.shape[1], weights.device), -1).amax(-1)
    return torch.minimum(first(kept & (running > u * running[:, -1:])), last)


def sample(problem: SampleProblem, logits: torch.Tensor, params: Params, u: torch.Tensor) -> torch.Tensor:
    """logits [R, V], u f32[R, 1] -> int32[R]; temperature 0 is argmax, -1 stands for a row with NaN or nothing kept."""
    x, heat = logits.float(), params["temperature"][:, None]
    top = x.amax(-1, keepdim=True)
    scaled = (x - top) / torch.where(heat > 0, heat, 1.0)
    weights = scaled.exp()
    weights = torch.where(kept_tokens(x, weights, params, UNUSED_BITS[logits.dtype]), weights, 0.0)
    if problem.typical:
        weights = torch.where(typical_tokens(scaled, weights, params["typical_p"]), weights, 0.0)
    ids = torch.where(heat[:, 0] > 0, inverse_cdf(weights, u), first(x == top))
    return torch.where(broken(x, top), -1, ids)


def logprobs(
    problem: SampleProblem, logits: torch.Tensor, ids: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [R, V], ids int32[R] -> (chosen f32[R], top ids int32[R, k], top f32[R, k]); natural logarithms, largest
    first, ties to the lowest id."""
    x = logits.float()
    logs = torch.log_softmax(x, -1)
    chosen = logs.gather(1, ids.clamp(min=0)[:, None].long())[:, 0]
    if k == 0:
        return chosen, ids.new_empty((len(ids), 0)), logs[:, :0]
    best = largest(x, k)
    return chosen, best, logs.gather(1, best.long())


def supports(problem: SampleProblem) -> str | None:
    if problem.vocab > EXACT_COUNTS:
        return f"counts tokens in float32, which is exact up to {EXACT_COUNTS} of them, not {problem.vocab}"
    return None


def recipes() -> list[Recipe]:
    typical = frozenset({"typical"})
    return [
        neuron_recipe("neuron_argmax", "argmax", stateless(argmax)),
        neuron_recipe("neuron_sample", "sample", with_problem(sample), handles=typical, supports=supports),
        neuron_recipe("neuron_logprobs", "logprobs", with_problem(logprobs), supports=supports),
    ]
