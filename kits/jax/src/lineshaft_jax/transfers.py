"""Moves pages between a cache and the host, or within a cache, a fixed number at a time so that nothing compiles late.

Devices only take pages out of a cache and put them into one; the canonical form is made and unmade on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.problems import KVProblem
from lineshaft_jax.arrays import HostArray
from lineshaft_jax.mesh import Placement, shards

FEW, MANY = 8, 512
"""Pages that one call moves; where fewer are left, the last one is moved several times."""

Arrays = Mapping[str, Any]


def chunks(most: int, *ids: HostArray) -> Iterator[list[HostArray]]:
    """The ids, MANY at a time as long as there are so many and `most` pages are no fewer, then FEW at a time."""
    first, count = 0, len(ids[0])
    while first < count:
        size = MANY if min(count - first, most) >= MANY else FEW
        yield [padded(np.asarray(each[first : first + size], np.int32), size) for each in ids]
        first += size


def padded(rows: HostArray, size: int) -> HostArray:
    """[n, ...] -> [size, ...], the last row repeated."""
    return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")


class PageMover:
    """Moves pages of caches of one problem on one mesh, in pools of `pages` pages."""

    def __init__(self, placement: Placement, problem: KVProblem, pages: int) -> None:
        self._placement, self._problem, self._pages = placement, problem, pages
        self._take, self._put = programs(placement.mesh)

    def read(self, held: Arrays, ids: HostArray) -> dict[str, HostArray]:
        """Pages in canonical form [n, page, heads, ...], the heads of one rank after another."""
        found = [self._take(dict(held), part) for (part,) in chunks(self._pages, ids)]
        return {name: self._joined(name, [part[name] for part in found])[: len(ids)] for name in held}

    def _joined(self, name: str, parts: Sequence[Any]) -> HostArray:
        """Pages [n, Hkv, page, Dp] of each rank, part by part -> [n, page, heads of all ranks, ...]."""
        (page, heads, *rest), dtype = self._problem.page_arrays[name]
        shape = (page, heads * self._placement.ranks, *rest)
        if not parts:
            return np.empty((0, *shape), numpy_dtype(dtype))
        whole = np.concatenate([np.concatenate(shards(part), axis=1) for part in parts])
        values = np.ascontiguousarray(whole[..., : (*rest, 1)[0]].swapaxes(1, 2))
        return values.view(numpy_dtype(dtype)).reshape(-1, *shape)

    def write(self, held: Arrays, ids: HostArray, pages: Mapping[str, HostArray]) -> Arrays:
        """The arrays with these canonical pages in them; those given are consumed."""
        kept = {name: self._kept(name, pages[name], array) for name, array in held.items()}
        first = 0
        for (part,) in chunks(self._pages, ids):
            size = len(part)
            new = {name: self._own(values[first : first + size], size) for name, values in kept.items()}
            held, first = self._put(dict(held), part, new), first + size
        return held

    def _kept(self, name: str, pages: HostArray, like: Any) -> HostArray:
        """[n, page, heads of all ranks, ...] -> [n, heads of all ranks, page, Dp], as the array `like` holds them."""
        (page, heads, *rest), dtype = self._problem.page_arrays[name]
        shape = (len(pages), page, heads * self._placement.ranks, (*rest, 1)[0])
        values = np.asarray(pages, numpy_dtype(dtype)).reshape(shape).swapaxes(1, 2)
        bits = np.ascontiguousarray(values).view(like.dtype)
        return np.pad(bits, [(0, 0)] * 3 + [(0, like.shape[-1] - bits.shape[-1])])

    def _own(self, values: HostArray, size: int) -> Any:
        """[n, heads of all ranks, page, Dp] -> each rank's own, `size` pages."""
        return self._placement.put_own(np.split(padded(values, size), self._placement.ranks, axis=1))

    def copy(self, held: Arrays, src: HostArray, dst: HostArray) -> Arrays:
        """The arrays with pages `src` copied to `dst`, all read before any is written; those given are consumed."""
        taken = [(part, self._take(dict(held), pages)) for pages, part in chunks(self._pages, src, dst)]
        for part, pages in taken:
            held = self._put(dict(held), part, pages)
        return held

    def warm(self, held: Arrays) -> Arrays:
        """The arrays after the null page was moved onto itself by every program that a later move may need."""
        for size in (FEW, MANY) if self._pages >= MANY else (FEW,):
            null = np.zeros(size, np.int32)
            held = self.copy(held, null, null)
        return held


@lru_cache(maxsize=256)
def programs(mesh: Any) -> tuple[Callable[..., Any], ...]:
    """(take, put) of pages as they are held, compiled for each shape and shared by all sessions of a process."""
    placement = Placement(mesh)

    def take(held: Arrays, ids: Any) -> dict[str, Any]:
        return {name: array[ids] for name, array in held.items()}

    def put(held: Arrays, ids: Any, pages: Arrays) -> dict[str, Any]:
        return {name: array.at[ids].set(pages[name]) for name, array in held.items()}

    return (
        placement.program(take, own=(True, False)),
        placement.program(put, own=(True, False, True), donate=(0,)),
    )
