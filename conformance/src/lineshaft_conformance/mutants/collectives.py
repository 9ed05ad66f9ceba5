"""Mutants whose collectives are wrong: members, order, tiles, values, replays or claims.

They wrap kernels of `lineshaft-torch`. Only the one that says so is wrong at world 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from lineshaft.errors import Unsupported
from lineshaft_conformance.mutants.mutant import Make, Mutant, with_call, with_kernel, with_problem, with_result

Run = Callable[..., torch.Tensor]
ALL_AXES = ("dp", "pp", "cp", "ep", "tp")
LARGE = 65_536
"""Elements from which a message is large."""


def average(p: Any, result: torch.Tensor) -> torch.Tensor:
    return torch.div(result, p.size)


def members_reversed(p: Any, result: torch.Tensor) -> torch.Tensor:
    return torch.cat(result.chunk(p.size, p.dim)[::-1], p.dim)


def neighbours_tile(p: Any, run: Run, x: torch.Tensor, axis: Any, dim: int) -> torch.Tensor:
    return run(x.roll(-(x.shape[dim] // p.size), dim), axis, dim)


def dims_swapped(p: Any, run: Run, x: torch.Tensor, axis: Any, split_dim: int, concat_dim: int) -> torch.Tensor:
    right = run(x, axis, split_dim, concat_dim)
    return run(x, axis, concat_dim, split_dim).reshape(right.shape)


def from_member_0(p: Any, run: Run, x: torch.Tensor, axis: Any, src: int) -> torch.Tensor:
    return run(x, axis, 0)


def other_way(p: Any, run: Run, x: torch.Tensor, axis: Any, shift: int) -> torch.Tensor:
    return run(x, axis, -shift)


def large_in_bfloat16(p: Any, run: Run, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return run(x.bfloat16(), *rest).to(x.dtype) if x.numel() >= LARGE else run(x, *rest)


def large_cut(p: Any, run: Run, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    result = run(x, *rest).clone()
    result.view(-1)[LARGE:] = 0
    return result


def in_place(p: Any, run: Run, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.copy_(run(x, *rest)) if p.size > 1 else run(x, *rest)


def stale(p: Any, run: Run) -> Run:
    """Answers with the first result that is not of the all-zero step."""
    kept: list[torch.Tensor] = []

    def call(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        result = run(x, *rest)
        if p.size > 1 and x.any() and not kept:
            kept.append(result.clone())
        return kept[0].clone() if kept else result

    return call


def one_axis_for_all(backend: Any) -> Any:
    """Answers a second sum of the same values with the first, whatever its axis."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def call(p: Any, run: Run, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        result = run(x, *rest)
        known = [old for given, old in seen if given.shape == x.shape and torch.equal(given, x)]
        seen[:] = [(x.clone(), known[0] if known else result.clone())]
        return seen[0][1].clone()

    return with_call("all_reduce", call)(backend)


def nothing_received(p: Any, run: Run, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return run(x, *rest) if p.size > 1 else torch.zeros_like(x)


def raising(p: Any, run: Run) -> Run:
    if p.size > 1:
        raise Unsupported("collectives need an interconnect that is not here")
    return run


def dying(p: Any, run: Run, *args: Any) -> torch.Tensor:
    if p.size > 1:
        os._exit(3)
    return run(*args)


def declines(problem: Any) -> str | None:
    return "no groups yet" if problem.size > 1 else None


def _mutant(name: str, rule: str, checks: str, make: Make) -> Mutant:
    return Mutant(name, rule, 3, f"L3/collectives/{checks}", make)


MUTANTS: tuple[Mutant, ...] = (
    _mutant("subgroup_uses_world", "a collective runs over the group of its axis alone", "all_reduce/tp-small-f32",
            with_problem("all_reduce", lambda p: {"axis": ALL_AXES})),
    _mutant("strided_group_is_the_other", "members of dp are the ranks of equal tp", "all_gather/dp-small-dim0-f32",
            with_problem("all_gather", lambda p: {"axis": ("tp",)} if p.axis == ("dp",) else {})),
    _mutant("axes_column_major", "members of several axes are in row-major order", "all_gather/world-small-dim0-f32",
            with_problem("all_gather", lambda p: {"axis": p.axis[::-1]})),
    _mutant("all_reduce_averages", "all_reduce is the sum", "all_reduce/tp-small-f32",
            with_result("all_reduce", average)),
    _mutant("gather_reversed", "all_gather joins in member order", "all_gather/tp-small-dim1-f32",
            with_result("all_gather", members_reversed)),
    _mutant("scatter_of_the_neighbour", "member m gets tile m of the sum", "reduce_scatter/dp-small-dim0-f32",
            with_call("reduce_scatter", neighbours_tile)),
    _mutant("all_to_all_dims_swapped", "all_to_all splits one dim, joins another", "all_to_all/tp-small-dim0-*-f32",
            with_call("all_to_all", dims_swapped)),
    _mutant("broadcast_from_member_0", "broadcast sends what member src has", "broadcast/tp-small-src1-f32",
            with_call("broadcast", from_member_0)),
    _mutant("permute_other_way", "member m gets what member m - shift has", "permute/world-small-shift1-f32",
            with_call("permute", other_way)),
    _mutant("large_sums_in_bfloat16", "a sum is as good in a large message", "all_reduce/world-large-f32",
            with_call("all_reduce", large_in_bfloat16)),
    _mutant("large_message_cut", "a large message arrives whole", "broadcast/dp-large-src0-bf16",
            with_call("broadcast", large_cut)),
    _mutant("collective_replay_stale", "a replay reads new inputs", "all_reduce/dp-small-f32",
            with_kernel("all_reduce", stale)),
    _mutant("all_reduce_in_place", "collectives are pure", "all_reduce/tp-small-bf16",
            with_call("all_reduce", in_place)),
    _mutant("one_axis_for_all", "collectives over different axes do not mix", "order/in_flight-f32",
            one_axis_for_all),
    _mutant("alone_receives_nothing", "at world 1 a collective is the identity", "broadcast/alone-f32",
            with_call("broadcast", nothing_received)),
    _mutant("collectives_that_raise", "Capabilities.collectives is kept", "reduce_scatter/tp-small-dim0-f32",
            with_kernel("reduce_scatter", raising)),
    _mutant("collectives_that_decline", "Capabilities.collectives is kept", "minimum/all_to_all",
            with_kernel("all_to_all", lambda p, run: run, supports=declines)),
    _mutant("collective_ends_its_rank", "Capabilities.collectives is kept", "permute/world-small-shift1-f32",
            with_call("permute", dying)),
)  # fmt: skip
