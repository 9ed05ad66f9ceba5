"""The collective ops over the session's process groups; groups are met when a kernel is bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lineshaft_contract.problems import CollectiveProblem
from lineshaft_torch.bound import Recipe, recipe

Axis = Any


def _bind(op: str, problem: CollectiveProblem, session: Any) -> Callable[..., torch.Tensor]:
    """The method of the group of the problem's axes; the op's own `axis` argument is dropped."""
    run = getattr(session.groups.group(problem.axis), op)

    def call(x: torch.Tensor, axis: Axis, *args: int, **kwargs: int) -> torch.Tensor:
        made: torch.Tensor = run(x, *args, **kwargs)
        return made

    return call


def recipes() -> list[Recipe]:
    """all_reduce(x, axis), all_gather(x, axis, dim), reduce_scatter(x, axis, dim),
    all_to_all(x, axis, split_dim, concat_dim), broadcast(x, axis, src), permute(x, axis, shift)."""
    ops = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute")
    return [recipe(f"torch_{op}", op, partial(_bind, op)) for op in ops]
