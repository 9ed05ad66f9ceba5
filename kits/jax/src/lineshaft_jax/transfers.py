"""Moves pages between a cache and the host, or within a cache, a few at a time so that nothing compiles twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from lineshaft.contract.problems import KVProblem
from lineshaft_jax.arrays import HostArray
from lineshaft_jax.kernels.pages import from_canonical, to_canonical
from lineshaft_jax.mesh import Placement, shards

AT_ONCE = 8
"""Pages that one call moves; where fewer are left, the last one is moved several times."""

Arrays = Mapping[str, Any]


def chunks(*ids: HostArray) -> Iterator[list[HostArray]]:
    """The ids, AT_ONCE at a time."""
    for first in range(0, len(ids[0]), AT_ONCE):
        yield [padded(np.asarray(each[first : first + AT_ONCE], np.int32)) for each in ids]


def padded(rows: HostArray) -> HostArray:
    """[n, ...] -> [AT_ONCE, ...], the last row repeated."""
    return np.pad(rows, [(0, AT_ONCE - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")


class PageMover:
    """Moves pages of caches of one problem on one mesh."""

    def __init__(self, placement: Placement, problem: KVProblem) -> None:
        self._placement, self._problem = placement, problem
        self._read, self._write, self._take, self._put = programs(placement.mesh, problem)

    def read(self, held: Arrays, ids: HostArray) -> dict[str, HostArray]:
        """Pages in canonical form [n, page, heads, ...], the heads of one rank after another."""
        found = [self._joined(self._read(dict(held), part)) for (part,) in chunks(ids)]
        empty = self._empty()
        return {name: np.concatenate([empty[name], *(part[name] for part in found)])[: len(ids)] for name in empty}

    def _joined(self, pages: Arrays) -> dict[str, HostArray]:
        return {name: np.concatenate(shards(array), axis=2) for name, array in pages.items()}

    def _empty(self) -> dict[str, HostArray]:
        ranks = self._placement.ranks
        return {
            name: np.empty((0, shape[0], ranks * shape[1], *shape[2:]), jnp.dtype(dtype))
            for name, (shape, dtype) in self._problem.page_arrays.items()
        }

    def write(self, held: Arrays, ids: HostArray, pages: Mapping[str, HostArray]) -> Arrays:
        """The arrays with these canonical pages in them; those given are consumed."""
        for first, (part,) in enumerate(chunks(ids)):
            start = first * AT_ONCE
            new = {name: self._cut(values[start : start + AT_ONCE]) for name, values in pages.items()}
            held = self._write(dict(held), part, new)
        return held

    def _cut(self, values: HostArray) -> Any:
        """[n, page, heads of all ranks, ...] -> each rank's own, AT_ONCE pages."""
        return self._placement.put_own(np.split(padded(values), self._placement.ranks, axis=2))

    def copy(self, held: Arrays, src: HostArray, dst: HostArray) -> Arrays:
        """The arrays with pages `src` copied to `dst`, all read before any is written; those given are consumed."""
        taken = [(part, self._take(dict(held), pages)) for pages, part in chunks(src, dst)]
        for part, pages in taken:
            held = self._put(dict(held), part, pages)
        return held


@lru_cache(maxsize=256)
def programs(mesh: Any, problem: KVProblem) -> tuple[Callable[..., Any], ...]:
    """(read, write, take, put), compiled when first called and shared by all sessions of a process: the first two move
    canonical pages, the others pages as they are held."""
    placement = Placement(mesh)

    def take(held: Arrays, ids: Any) -> dict[str, Any]:
        return {name: array[ids] for name, array in held.items()}

    def put(held: Arrays, ids: Any, pages: Arrays) -> dict[str, Any]:
        return {name: array.at[ids].set(pages[name]) for name, array in held.items()}

    def read(held: Arrays, ids: Any) -> dict[str, Any]:
        return to_canonical(problem, take(held, ids))

    def write(held: Arrays, ids: Any, pages: Arrays) -> dict[str, Any]:
        return put(held, ids, from_canonical(problem, pages, held))

    return (
        placement.program(read, own=(True, False)),
        placement.program(write, own=(True, False, True), donate=(0,)),
        placement.program(take, own=(True, False)),
        placement.program(put, own=(True, False, True), donate=(0,)),
    )
