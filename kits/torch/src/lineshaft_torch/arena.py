"""Placing buffers of known lifetimes at offsets of one arena. Knows sizes and call numbers, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Every buffer starts at a multiple of this many bytes: a cache line, and the widest vector register."""


@dataclass
class Lifetime:
    """A buffer of `nbytes`, written by call `first` and last read by call `last`; both calls count as live."""

    nbytes: int
    first: int
    last: int


def plan_offsets(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """An offset for each buffer, so that no two that live together overlap, and the arena's size in bytes.

    Greedy: in order of `first`, into the smallest gap between live buffers that is large enough, else at the end.
    """
    offsets = [0] * len(lifetimes)
    live: list[int] = []
    total = 0
    for index in sorted(range(len(lifetimes)), key=lambda i: lifetimes[i].first):
        item = lifetimes[index]
        live = [other for other in live if lifetimes[other].last >= item.first]
        spans = sorted((offsets[other], offsets[other] + _aligned(lifetimes[other].nbytes)) for other in live)
        offsets[index] = _best_fit(spans, _aligned(item.nbytes))
        total = max(total, offsets[index] + _aligned(item.nbytes))
        live.append(index)
    return offsets, total


def _best_fit(spans: Sequence[tuple[int, int]], nbytes: int) -> int:
    """Start of the tightest gap between `spans` (sorted, disjoint) that holds `nbytes`, else the end of the last."""
    end, best, slack = 0, -1, -1
    for start, stop in spans:
        spare = start - end - nbytes
        if spare >= 0 and (best < 0 or spare < slack):
            best, slack = end, spare
        end = stop
    return end if best < 0 else best


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
