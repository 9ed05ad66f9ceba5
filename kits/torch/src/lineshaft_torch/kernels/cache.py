"""Writing keys and values into a cache of the "slots" layout, and moving its pages and slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_torch.bound import Recipe, recipe, with_problem
from lineshaft_torch.pages import SLOTS_LAYOUT, movable, page_view, stored_as

Pages = Mapping[str, torch.Tensor]


def write_kv(problem: KVProblem, cache: Cache, k: torch.Tensor, v: torch.Tensor | None, step: StepInputs) -> Cache:
    """k [T, Hkv, D], v [T, Hkv, Dv] or None -> the cache with both stored at the group's slots."""
    slots = step.groups[problem.group].slots.long()
    for name, new in (("k", k), ("v", v)):
        if new is not None:
            array = cache.arrays[name]
            movable(array).index_copy_(0, slots, movable(stored_as(new, array.dtype)))
    return cache


def read_pages(problem: KVProblem, cache: Cache, ids: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """ids int32[n] -> k [n, page, Hkv, D] and, if the cache holds values, v [n, page, Hkv, Dv]."""
    out = tuple(movable(a).index_select(0, ids).view(a.dtype) for a in page_view(cache).values())
    return out if len(out) > 1 else out[0]


def write_pages(problem: KVProblem, cache: Cache, ids: torch.Tensor, pages: Pages) -> Cache:
    """pages {name: [n, page, ...]} -> the cache with them at `ids`."""
    for name, array in page_view(cache).items():
        movable(array).index_copy_(0, ids.long(), movable(pages[name]))
    return cache


def copy_pages(problem: KVProblem, cache: Cache, src: torch.Tensor, dst: torch.Tensor) -> Cache:
    """The cache with page src[i] at dst[i]; all reads come before all writes."""
    return _copied(cache, page_view(cache), src, dst)


def copy_slots(problem: KVProblem, cache: Cache, src: torch.Tensor, dst: torch.Tensor) -> Cache:
    """The cache with slot src[i] at dst[i]; all reads come before all writes."""
    return _copied(cache, cache.arrays, src, dst)


def _copied(cache: Cache, arrays: Pages, src: torch.Tensor, dst: torch.Tensor) -> Cache:
    for array in arrays.values():
        movable(array).index_copy_(0, dst.long(), movable(array).index_select(0, src))
    return cache


def consuming(run: Callable[..., Cache]) -> Callable[[KVProblem, Any], Callable[..., Cache]]:
    """Bind `run`, which changes its cache in place; in a functional session it is given a copy."""

    def bind(problem: KVProblem, session: Any) -> Callable[..., Cache]:
        def in_place(cache: Cache, *args: Any) -> Cache:
            return run(problem, cache, *args)

        def functional(cache: Cache, *args: Any) -> Cache:
            return run(problem, replace(cache, arrays={name: a.clone() for name, a in cache.arrays.items()}), *args)

        return functional if session.options.functional else in_place

    return bind


def recipes() -> list[Recipe]:
    changing: list[Callable[..., Cache]] = [write_kv, write_pages, copy_pages, copy_slots]
    return [
        *(recipe(f"torch_{run.__name__}", run.__name__, consuming(run), layout=SLOTS_LAYOUT) for run in changing),
        recipe("torch_read_pages", "read_pages", with_problem(read_pages), layout=SLOTS_LAYOUT),
    ]
