"""Which page that nobody holds is given up first. Knows pages as numbers, and what is remembered of each.

A policy ranks an idle page by two facts: `born`, when its sequence began and how deep in it the page lies (later pages
of one sequence come first), and `uses`, how many sequences took it from the cache. The lowest rank goes first, and of
equal ranks the page that has been idle longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from heapq import heapify, heappop, heappush

Born = tuple[int, int]
Rank = Callable[[Born, int], tuple[int, ...]]

EVICTION: Mapping[str, Rank] = {
    "lru": lambda born, uses: (),
    "fifo": lambda born, uses: born,
    "lfu": lambda born, uses: (uses,),
}
"""Least recently used, first in first out, least frequently used."""

SLACK = 64
"""Stale entries of the heap beyond as many as live ones, before it is made anew."""


class IdlePages:
    """The pages that nobody holds and that are kept for their contents; iterates in no order."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._ticks = 0
        self._entries: dict[int, tuple[tuple[int, ...], int, int]] = {}
        self._heap: list[tuple[tuple[int, ...], int, int]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def add(self, page: int, born: Born, uses: int) -> None:
        """Note that a page became idle."""
        self._ticks += 1
        self._entries[page] = entry = (self._rank(born, uses), self._ticks, page)
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + SLACK:
            self._heap = list(self._entries.values())
            heapify(self._heap)

    def remove(self, page: int) -> None:
        """Note that an idle page is no longer idle."""
        del self._entries[page]

    def first(self) -> int:
        """Return the page to give up first; there is one."""
        while self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heappop(self._heap)
        return self._heap[0][2]
