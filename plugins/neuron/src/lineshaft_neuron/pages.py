"""Reading, writing and copying pages of caches by compiled programs, a fixed number of pages a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_neuron.lanes import Compiled, Lane
from lineshaft_neuron.tracing import Result, trace
from lineshaft_torch.arrays import HostArray, from_host, to_host
from lineshaft_torch.pages import movable, page_view

NO_IDS = np.zeros(0, np.int32)
PAGES = 16
"""Pages that one call moves."""

Moving = tuple[Callable[[], Result], list[torch.Tensor]]
"""What a program does, and the tensors that it is given."""


class PageMover:
    """Moves pages of the caches of a session. Caches of one problem share their programs: one reads, one writes, and
    one copies a page table's pages in all caches of a group."""

    def __init__(self, lane: Lane, caches: Sequence[Cache]) -> None:
        self._lane, self._caches = lane, list(caches)
        self._programs: dict[tuple[str, object], Compiled] = {}
        self._ids = [torch.zeros(PAGES, dtype=torch.int32, device=lane.device) for _ in range(2)]

    def warm(self) -> None:
        """Compile what there is to compile."""
        for cache in self._caches:
            self._reader(cache)
            self._writer(cache)
        for group in {_problem(cache).group for cache in self._caches}:
            self._copier(group)

    def read(self, number: int, ids: HostArray) -> dict[str, HostArray]:
        """The pages at `ids` of a cache, in canonical form."""
        cache = self._caches[number]
        found = {
            name: np.empty((len(ids), *shape), numpy_dtype(dtype))
            for name, (shape, dtype) in _problem(cache).page_arrays.items()
        }
        run = self._reader(cache)
        for start, stop in self._chunks(len(ids)):
            self._send(0, ids[start:stop])
            for host, made in zip(found.values(), run(self._ids[0], *cache.arrays.values()), strict=True):
                host[start:stop] = to_host(made)[: stop - start]
        return found

    def write(self, number: int, ids: HostArray, pages: Mapping[str, HostArray]) -> None:
        """Put pages in canonical form at `ids` of a cache."""
        cache = self._caches[number]
        run, room = self._writer(cache), self._empty(cache)
        for start, stop in self._chunks(len(ids)):
            some = np.minimum(np.arange(start, start + PAGES), stop - 1)  # the last page again and again
            self._send(0, ids[some])
            for name, array in room.items():
                array.copy_(from_host(pages[name][some]))
            run(self._ids[0], *room.values(), *cache.arrays.values())

    def copy(self, group: int, src: HostArray, dst: HostArray) -> None:
        """Copy pages within every cache of a group; all reads come before all writes."""
        if len(src) > PAGES:  # a later call must not read what an earlier one wrote
            for number, cache in enumerate(self._caches):
                if _problem(cache).group == group:
                    self.write(number, dst, self.read(number, src))
            return
        run = self._copier(group)
        self._send(0, src)
        self._send(1, dst)
        run(*self._ids, *self._arrays(group))

    # ---- programs ----------------------------------------------------------------------------------------------

    def _reader(self, cache: Cache) -> Compiled:
        return self._program(("read", _problem(cache)), lambda: self._reading(cache))

    def _writer(self, cache: Cache) -> Compiled:
        return self._program(("write", _problem(cache)), lambda: self._writing(cache))

    def _copier(self, group: int) -> Compiled:
        return self._program(("copy", group), lambda: self._copying(group))

    def _program(self, key: tuple[str, object], make: Callable[[], Moving]) -> Compiled:
        if key not in self._programs:
            for place in range(len(self._ids)):  # compiling may run the program
                self._send(place, NO_IDS)
            run, given = make()
            traced = trace(run, given)
            self._programs[key] = self._lane.compile(traced.graph, given, traced.written)
        return self._programs[key]

    def _reading(self, cache: Cache) -> Moving:
        def run() -> Result:
            return {
                name: movable(view).index_select(0, self._ids[0]).view(view.dtype)
                for name, view in page_view(cache).items()
            }, []

        return run, [self._ids[0], *cache.arrays.values()]

    def _writing(self, cache: Cache) -> Moving:
        """Its first call puts back what the null page holds."""
        held = self._reader(cache)(self._ids[0], *cache.arrays.values())
        pages = dict(zip(cache.arrays, held, strict=True))

        def run() -> Result:
            for name, view in page_view(cache).items():
                movable(view).index_copy_(0, self._ids[0].long(), movable(pages[name]))
            return {}, []

        return run, [self._ids[0], *pages.values(), *cache.arrays.values()]

    def _copying(self, group: int) -> Moving:
        def run() -> Result:
            for cache in self._caches:
                if _problem(cache).group == group:
                    for view in map(movable, page_view(cache).values()):
                        view.index_copy_(0, self._ids[1].long(), view.index_select(0, self._ids[0]))
            return {}, []

        return run, [*self._ids, *self._arrays(group)]

    # ---- arrays ------------------------------------------------------------------------------------------------

    def _arrays(self, group: int) -> list[torch.Tensor]:
        return [array for cache in self._caches if _problem(cache).group == group for array in cache.arrays.values()]

    def _empty(self, cache: Cache) -> dict[str, torch.Tensor]:
        """Room on the device for the pages of one call."""
        return {
            name: torch.zeros((PAGES, *view.shape[1:]), dtype=view.dtype, device=self._lane.device)
            for name, view in page_view(cache).items()
        }

    def _send(self, place: int, ids: HostArray) -> None:
        """Fill one of the arrays of ids; what is left names the null page."""
        padded = np.zeros(PAGES, np.int32)
        padded[: len(ids)] = ids
        self._ids[place].copy_(from_host(padded))

    @staticmethod
    def _chunks(count: int) -> Iterator[tuple[int, int]]:
        for start in range(0, count, PAGES):
            yield start, min(start + PAGES, count)


def _problem(cache: Cache) -> KVProblem:
    assert isinstance(cache.problem, KVProblem)
    return cache.problem
