"""Mixture of experts on the device: routing without a sort, rows placed by counting, and experts on static shapes."""

from __future__ import annotations

from typing import Any

import torch

from lineshaft_contract.problems import ExpertProblem, RouterProblem
from lineshaft_neuron.kernels.bound import neuron_recipe
from lineshaft_neuron.kernels.ranking import are_largest, iota, largest
from lineshaft_torch.bound import DENSE, Recipe, dense, stateless, with_problem
from lineshaft_torch.kernels.experts import EXPERT_FEATURES, activate
from lineshaft_torch.kernels.experts import grouped_mlp as by_expert
from lineshaft_torch.kernels.experts import supports as supports_activation

COPIED_MIB = 256
"""The most that a copy of experts' weights, one expert for each row, may take."""


def router_topk(problem: RouterProblem, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> (ids int32[T, k], weights f32[T, k], unrounded), largest first, ties to the lowest id."""
    x = logits.float()
    ids = largest(torch.where(eligible(problem, x), x, -torch.inf) if problem.groups else x, problem.k)
    before = problem.softmax == "before"
    probs = (torch.softmax(x, -1) if before else x).gather(1, ids.long())
    probs = probs if before else torch.softmax(probs, -1)
    if problem.renormalise:
        probs = probs / probs.sum(-1, keepdim=True)
    return ids, probs * problem.scale


def eligible(problem: RouterProblem, x: torch.Tensor) -> torch.Tensor:
    """x f32[T, E] -> bool[T, E]: experts of the groups with the largest logits."""
    members = x.reshape(-1, problem.groups, problem.experts // problem.groups)
    chosen = are_largest(members.amax(-1), problem.group_top)
    return chosen[:, :, None].expand(members.shape).flatten(1)


def moe_dispatch(
    x: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor, local: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], ids int32[T, k], expert_map int32[E] -> (rows [T * k, H] by local expert, offsets int32[local + 1],
    source int32[T * k]); rows for experts elsewhere come last and are 0.

    An assignment's place is the number of those to earlier experts, and of earlier ones to its own.
    """
    expert = dense(expert_map).index_select(0, ids.flatten())
    expert = torch.where(expert < 0, local, expert)
    chosen = expert[:, None] == iota(local + 1, x.device)
    running = chosen.cumsum(0, dtype=torch.int32)
    offsets = running[-1].cumsum(0, dtype=torch.int32) - running[-1]
    place = torch.where(chosen, offsets + running - 1, 0).sum(-1, dtype=torch.int32).long()
    source = torch.zeros_like(expert).index_copy(0, place, iota(len(expert), x.device))
    given = x[:, None].expand(-1, ids.shape[1], -1).flatten(0, 1)
    given = torch.where((expert < local)[:, None], given, 0.0)
    return torch.zeros_like(given).index_copy(0, place, given), offsets, source


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
    """x [C, H], w13 [L, 2F, H], w2 [L, H, F], offsets int32[L + 1], biases [L, 2F] and [L, H] -> [C, H].

    Few rows each fetch their expert's weights; else every expert runs on every row, because shapes are static.
    """
    if fetches(problem):
        biases = (b if b is None else dense(b) for b in (w13_bias, w2_bias))
        return by_row(problem, x, offsets, dense(w13), dense(w2), *biases)
    return by_expert(problem, x, w13, w2, offsets, w13_bias=w13_bias, w2_bias=w2_bias)


def fetches(problem: ExpertProblem) -> bool:
    """Whether there are fewer rows than experts, whose weights, copied in float32, stay within COPIED_MIB."""
    copied = 4 * 3 * problem.rows * problem.width * problem.hidden
    return problem.rows < problem.local and copied <= COPIED_MIB * 2**20


def by_row(
    problem: ExpertProblem, x: torch.Tensor, offsets: torch.Tensor, w13: Any, w2: Any, *biases: Any
) -> torch.Tensor:
    """[C, H], as `grouped_mlp` takes them: each row with a copy of its expert's weights."""
    row = iota(x.shape[0], x.device)
    expert = (row[:, None] >= offsets[1:]).sum(-1, dtype=torch.int32).clamp(max=problem.local - 1)
    gate_up, down, *added = (
        None if part is None else part.index_select(0, expert).float() for part in (w13, w2, *biases)
    )
    first, second = (0.0 if bias is None else bias for bias in added)
    gate, up = (torch.einsum("ch,cfh->cf", x.float(), gate_up) + first).chunk(2, -1)
    hidden = activate(problem, gate, up).to(x.dtype).float()
    out = (torch.einsum("cf,chf->ch", hidden, down) + second).to(x.dtype)
    return torch.where((row < offsets[-1])[:, None], out, 0.0)


def recipes() -> list[Recipe]:
    return [
        neuron_recipe("neuron_router_topk", "router_topk", with_problem(router_topk), handles=frozenset({"groups"})),
        neuron_recipe("neuron_moe_dispatch", "moe_dispatch", stateless(moe_dispatch)),
        neuron_recipe(
            "neuron_grouped_mlp", "grouped_mlp", with_problem(grouped_mlp), layout=DENSE, supports=supports_activation,
            handles=EXPERT_FEATURES,
        ),
    ]  # fmt: skip
