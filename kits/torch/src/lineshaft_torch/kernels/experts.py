"""Mixture of experts with static, lossless capacity: routing, sorting rows by expert, their MLPs, and the sum.

`expert_mlp` has no kernel of its own here: its default decomposition calls these, or better ones of a backend.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lineshaft_contract.problems import ExpertProblem, RouterProblem
from lineshaft_torch.arrays import accumulator
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe, stateless, with_problem

Out = torch.Tensor | None
Biases = tuple[torch.Tensor | None, ...]

EXPERT_FEATURES = frozenset({"bias", "swiglu_alpha", "swiglu_limit"})


def router_topk(problem: RouterProblem, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> (ids int32[T, k], weights [T, k], unrounded), largest first, ties to the lowest id."""
    x = logits.to(accumulator(logits.dtype))
    ranked = x if not problem.groups else x.masked_fill(~_eligible(problem, x), -torch.inf)
    ids = ranked.sort(stable=True, dim=-1, descending=True).indices[:, : problem.k]
    before = problem.softmax == "before"
    probs = (torch.softmax(x, -1) if before else x).gather(1, ids)
    probs = probs if before else torch.softmax(probs, -1)
    if problem.renormalise:
        probs = probs / probs.sum(-1, keepdim=True)
    return ids.int(), probs * problem.scale


def _eligible(problem: RouterProblem, x: torch.Tensor) -> torch.Tensor:
    """bool[T, E]: experts of the groups with the largest logits."""
    best = x.unflatten(1, (problem.groups, -1)).amax(-1)
    chosen = best.sort(stable=True, dim=-1, descending=True).indices[:, : problem.group_top]
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
    return allowed.repeat_interleave(problem.experts // problem.groups, 1)


def moe_dispatch(
    x: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor, local: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], ids int32[T, k], expert_map int32[E] -> (rows [T * k, H] by local expert, offsets int32[local + 1],
    source int32[T * k]); rows for experts elsewhere come last and are 0."""
    expert = dense(expert_map).index_select(0, ids.reshape(-1))
    expert, source = torch.where(expert < 0, local, expert).sort(stable=True)
    offsets = torch.searchsorted(expert, torch.arange(local + 1, device=x.device, dtype=expert.dtype))
    rows = x.index_select(0, source // ids.shape[1]).masked_fill_((expert >= local)[:, None], 0)
    return rows, offsets.int(), source.int()


def gated_mlp(
    problem: ExpertProblem, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, biases: Biases = (None, None)
) -> torch.Tensor:
    """x [n, H], w13 [2F, H], w2 [H, F], biases [2F] and [H] -> [n, H]; products accumulate wide, the hidden activation
    is rounded once."""
    wide = accumulator(x.dtype)
    first, second = (None if bias is None else bias.to(wide) for bias in biases)
    gate, up = F.linear(x.to(wide), w13.to(wide), first).chunk(2, -1)
    hidden = activate(problem, gate, up).to(x.dtype).to(wide)
    return F.linear(hidden, w2.to(wide), second).to(x.dtype)


def activate(problem: ExpertProblem, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [n, F] -> what the problem's activation makes of them [n, F]."""
    if problem.activation == "swigluoai":
        gate, up = gate.clamp(max=problem.swiglu_limit), up.clamp(-problem.swiglu_limit, problem.swiglu_limit)
        return gate * torch.sigmoid(problem.swiglu_alpha * gate) * (up + 1)
    return (F.silu(gate) if problem.activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def of_expert(e: int, *arrays: Any) -> tuple[torch.Tensor | None, ...]:
    """Expert e's part of each array or weight that is not None."""
    return tuple(None if array is None else dense(array)[e] for array in arrays)


def grouped_mlp(
    problem: ExpertProblem,
    x: torch.Tensor,
    w13: Any,
    w2: Any,
    offsets: torch.Tensor,
    *,
    w13_bias: Any = None,
    w2_bias: Any = None,
) -> torch.Tensor:
    """x [C, H], w13 [L, 2F, H], w2 [L, H, F], offsets int32[L + 1], biases [L, 2F] and [L, H] -> [C, H]; every expert
    is run on every row, and its result taken for its own rows, because shapes are static."""
    row = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for e in range(problem.local):
        own = (row >= offsets[e]) & (row < offsets[e + 1])
        biases = of_expert(e, w13_bias, w2_bias)
        out = torch.where(own[:, None], gated_mlp(problem, x, dense(w13)[e], dense(w2)[e], biases), out)
    return out


def moe_combine(rows: torch.Tensor, source: torch.Tensor, probs: torch.Tensor, *, out: Out = None) -> torch.Tensor:
    """rows [T * k, H], source int32[T * k], probs [T, k] -> the weighted sum of each token's rows [T, H]."""
    ordered = torch.empty_like(rows, dtype=probs.dtype, memory_format=torch.contiguous_format)
    ordered.index_copy_(0, source.long(), rows.to(probs.dtype))
    total = torch.einsum("tk,tkh->th", probs, ordered.view(*probs.shape, -1))
    return total.to(rows.dtype) if out is None else out.copy_(total)


def supports(problem: ExpertProblem) -> str | None:
    known = ("silu", "gelu", "swigluoai")
    return None if problem.activation in known else f"knows the activations {known}, not {problem.activation!r}"


def recipes() -> list[Recipe]:
    return [
        recipe("torch_router_topk", "router_topk", with_problem(router_topk), handles=frozenset({"groups"})),
        recipe("torch_moe_dispatch", "moe_dispatch", stateless(moe_dispatch)),
        recipe(
            "torch_grouped_mlp", "grouped_mlp", with_problem(grouped_mlp), layout=DENSE, supports=supports,
            handles=EXPERT_FEATURES,
        ),
        recipe("torch_moe_combine", "moe_combine", stateless(moe_combine), out=True),
    ]  # fmt: skip
