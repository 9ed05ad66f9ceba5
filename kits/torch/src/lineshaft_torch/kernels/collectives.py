"""The collective ops over the session's process groups; groups are met when a kernel is bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lineshaft_contract.problems import CollectiveProblem
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.collectives import Group

Axis = Any


def _binding(run: Callable[..., torch.Tensor]) -> Callable[[CollectiveProblem, Any], Callable[..., torch.Tensor]]:
    """Bind `run(group, x, ...)` to the group of the problem's axes; the op's own `axis` argument is dropped."""

    def bind(problem: CollectiveProblem, session: Any) -> Callable[..., torch.Tensor]:
        group = session.groups.group(problem.axis)

        def call(x: torch.Tensor, axis: Axis, *args: int, **kwargs: int) -> torch.Tensor:
            return run(group, x, *args, **kwargs)

        return call

    return bind


def recipes() -> list[Recipe]:
    """all_reduce(x, axis), all_gather(x, axis, dim), reduce_scatter(x, axis, dim),
    all_to_all(x, axis, split_dim, concat_dim), broadcast(x, axis, src), permute(x, axis, shift)."""
    methods: dict[str, Callable[..., torch.Tensor]] = {
        "all_reduce": Group.all_reduce, "all_gather": Group.all_gather, "reduce_scatter": Group.reduce_scatter,
        "all_to_all": Group.all_to_all, "broadcast": Group.broadcast, "permute": Group.permute,
    }  # fmt: skip
    return [recipe(f"torch_{op}", op, _binding(run)) for op, run in methods.items()]
