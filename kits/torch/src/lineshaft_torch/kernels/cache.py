"""Writing keys and values into a cache of the "slots" layout, and moving its pages."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lineshaft.contract.problems import KVProblem
from lineshaft.contract.sessions import Cache
from lineshaft.contract.steps import StepInputs

from lineshaft_torch.bound import Recipe, recipe, stateless
from lineshaft_torch.pages import SLOTS_LAYOUT, page_view


def write_kv(group: int, cache: Cache, k: torch.Tensor, v: torch.Tensor | None, step: StepInputs) -> Cache:
    """k [T, Hk, D], v [T, Hk, Dv] or None -> the same cache with both stored at the group's slots, in place."""
    slots = step.groups[group].slots.long()
    for name, new in (("k", k), ("v", v)):
        if new is not None:
            array = cache.arrays[name]
            array.index_copy_(0, slots, new if new.dtype == array.dtype else new.to(array.dtype))
    return cache


def write_kv_functional(group: int, cache: Cache, k: torch.Tensor, v: torch.Tensor | None, step: StepInputs) -> Cache:
    """As write_kv, into a copy: the cache given stays as it was."""
    copied = replace(cache, arrays={name: array.clone() for name, array in cache.arrays.items()})
    return write_kv(group, copied, k, v, step)


def _bind_write(problem: KVProblem, session: Any) -> Any:
    return partial(write_kv_functional if session.options.functional else write_kv, problem.group)


def recipes() -> list[Recipe]:
    return [recipe("torch_write_kv", "write_kv", _bind_write, layout=SLOTS_LAYOUT)]
