"""The collective ops by the names of mesh axes, inside of a function that is mapped over a mesh (`jax.shard_map`).

Sums are made in float32 and rounded once; integers are summed as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.problems import CollectiveProblem
from lineshaft_jax.arrays import Array, as_bits, of_dtype, widened
from lineshaft_jax.bound import Recipe, recipe

Axes = tuple[str, ...]


def all_reduce(axes: Axes, size: int, x: Array) -> Array:
    """The sum over all members."""
    return lax.psum(summable(x), axes).astype(x.dtype)


def all_gather(axes: Axes, size: int, x: Array, dim: int) -> Array:
    """The members' arrays, joined along `dim` in member order."""
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def reduce_scatter(axes: Axes, size: int, x: Array, dim: int) -> Array:
    """This member's tile, along `dim`, of the sum."""
    return lax.psum_scatter(summable(x), axes, scatter_dimension=dim, tiled=True).astype(x.dtype)


def all_to_all(axes: Axes, size: int, x: Array, split_dim: int, concat_dim: int) -> Array:
    """Tile i of `split_dim` goes to member i; what arrives is joined along `concat_dim` in member order."""
    return lax.all_to_all(x, axes, split_dim, concat_dim, tiled=True)


def broadcast(axes: Axes, size: int, x: Array, src: int) -> Array:
    """Member `src`'s array, bit by bit: a sum of integers that are 0 everywhere else."""
    bits = as_bits(x).astype(jnp.uint32)
    whole = lax.psum(jnp.where(lax.axis_index(axes) == src, bits, 0), axes)
    return of_dtype(whole.astype(as_bits(x).dtype), x.dtype.name)


def permute(axes: Axes, size: int, x: Array, shift: int) -> Array:
    """The array of the member `shift` places before this one, cyclically."""
    order = mesh_order(axes)
    return lax.ppermute(x, axes, [(order[m], order[(m + shift) % size]) for m in range(size)])


def mesh_order(axes: Axes) -> list[int]:
    """Of each member, row-major over `axes`, its place row-major over the mesh: `lax.ppermute`, unlike all others,
    counts members so."""
    by_mesh = sorted(axes, key=jax.sharding.get_abstract_mesh().axis_names.index)
    degrees = [lax.axis_size(name) for name in axes]
    order = []
    for place in product(*map(range, degrees)):
        at, index = dict(zip(axes, place, strict=True)), 0
        for name in by_mesh:
            index = index * lax.axis_size(name) + at[name]
        order.append(index)
    return order


def summable(x: Array) -> Array:
    """x in the dtype that its sums are made in."""
    return widened(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def axes_of(problem: CollectiveProblem) -> Axes:
    """The problem's axes that the mesh of the mapped function around has: it may lack those of size 1.

    Raises ContractViolation where the members of these axes are not as many as the problem's.
    """
    degrees = {name: degree for name in problem.axis if (degree := _degree(name))}
    if math.prod(degrees.values()) != problem.size:
        raise ContractViolation(
            f"a collective of {problem.size} members over {'+'.join(problem.axis)}: of these axes the mesh around has "
            f"{degrees or 'none'}; capture it under a mesh of the plan's degrees"
        )
    return tuple(degrees)


def _degree(name: str) -> int | None:
    try:
        return int(lax.axis_size(name))
    except NameError:
        return None


def binding(run: Callable[..., Array]) -> Callable[[CollectiveProblem, Any], Callable[..., Array]]:
    """Bind `run(axes, size, x, ...)` to the problem's axes; the op's own `axis` argument is dropped. Among one member
    every collective hands its input back."""

    def bind(problem: CollectiveProblem, session: Any) -> Callable[..., Array]:
        def call(x: Array, axis: Any, *args: int, **kwargs: int) -> Array:
            return x if problem.size == 1 else run(axes_of(problem), problem.size, x, *args, **kwargs)

        return call

    return bind


def recipes() -> list[Recipe]:
    """all_reduce(x, axis), all_gather(x, axis, dim), reduce_scatter(x, axis, dim),
    all_to_all(x, axis, split_dim, concat_dim), broadcast(x, axis, src), permute(x, axis, shift)."""
    runs: list[Callable[..., Array]] = [all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, permute]
    return [recipe(f"xla_{run.__name__}", run.__name__, binding(run)) for run in runs]
