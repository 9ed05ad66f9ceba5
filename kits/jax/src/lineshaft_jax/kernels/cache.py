"""Writing keys and values into a cache of the "hnd" layout, and moving its pages and slots.

Every function is pure; where the caller donates the cache's arrays, the compiled scatter is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax.numpy as jnp

from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_jax.arrays import Array
from lineshaft_jax.bound import Recipe, recipe, with_problem
from lineshaft_jax.kernels.pages import LAYOUT, from_canonical, stored, to_canonical
from lineshaft_jax.kernels.schemes import SCHEMES, encode

Pages = Mapping[str, Array]


def write_kv(
    problem: KVProblem, cache: Cache, k: Array, v: Array | None, step: StepInputs, *, kv_scales: Array | None = None
) -> Cache:
    """k [T, Hkv, D], v [T, Hkv, Dv] or None -> the cache with both stored at the group's slots."""
    arrays = dict(cache.arrays)
    at = place(problem, step.groups[problem.group].slots)
    for index, (name, new) in enumerate((("k", k), ("v", v))):
        if new is not None:
            for part, values in encode(problem, name, new, None if kv_scales is None else kv_scales[index]).items():
                arrays[part] = arrays[part].at[at].set(stored(values, arrays[part]))
    return replace(cache, arrays=arrays)


def place(problem: KVProblem, slots: Array) -> tuple[Array, Array, Array]:
    """slots int32[T] -> indices (page, head, offset) [T, Hkv] into an array of a cache.

    An index per head: with a slice over heads the compiler for TPUs copies the whole cache in a step of many tokens.
    """
    heads = jnp.arange(problem.kv_heads, dtype=slots.dtype)
    return (slots // problem.page_size)[:, None], heads[None], (slots % problem.page_size)[:, None]


def read_pages(problem: KVProblem, cache: Cache, ids: Array) -> Array | tuple[Array, ...]:
    """ids int32[n] -> each array's pages in canonical order, k [n, page, Hkv, D] first; a bare array if alone."""
    found = to_canonical(problem, {name: array[ids] for name, array in cache.arrays.items()})
    out = tuple(found.values())
    return out if len(out) > 1 else out[0]


def write_pages(problem: KVProblem, cache: Cache, ids: Array, pages: Pages) -> Cache:
    """pages {name: [n, page, ...]} -> the cache with them at `ids`."""
    new = from_canonical(problem, pages, cache.arrays)
    return replace(cache, arrays={name: array.at[ids].set(new[name]) for name, array in cache.arrays.items()})


def copy_pages(problem: KVProblem, cache: Cache, src: Array, dst: Array) -> Cache:
    """The cache with page src[i] at dst[i]; all reads come before all writes."""
    return replace(cache, arrays={name: array.at[dst].set(array[src]) for name, array in cache.arrays.items()})


def copy_slots(problem: KVProblem, cache: Cache, src: Array, dst: Array) -> Cache:
    """The cache with slot src[i] at dst[i]; all reads come before all writes."""
    old, new = place(problem, src), place(problem, dst)
    return replace(cache, arrays={name: array.at[new].set(array[old]) for name, array in cache.arrays.items()})


def supports(problem: KVProblem) -> str | None:
    """The `supports` of all kernels that touch a cache."""
    if problem.kv_dtype in ("float64", "int64"):
        return f"keeps pages of at most 32 bits a value, not {problem.kv_dtype}"
    known = ("none", *SCHEMES)
    return None if problem.kv_scheme in known else f"knows kv_scheme {', '.join(known)}, not {problem.kv_scheme!r}"


def recipes() -> list[Recipe]:
    runs: list[Callable[..., object]] = [write_kv, read_pages, write_pages, copy_pages, copy_slots]
    handles = frozenset({"kv_scheme"})
    return [
        recipe(
            f"xla_{run.__name__}", run.__name__, with_problem(run), layout=LAYOUT, handles=handles, supports=supports
        )
        for run in runs
    ]
