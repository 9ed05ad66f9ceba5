"""The pages of preempted sequences that wait on the host of one worker, until they are brought back or given up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lineshaft.cache import PageSwap
from lineshaft_contract.sessions import HostArray, Session, Transfer

Saved = list[dict[str, HostArray]]
"""Of each cache of a group, its pages in canonical form."""


class HostPages:
    """Holds pages by sequence and group. `groups`: the group of each cache, in the caches' order."""

    def __init__(self, groups: Sequence[int]) -> None:
        self._groups = list(groups)
        self._saved: dict[tuple[int, int], Saved] = {}

    def save(self, session: Session, swaps: Sequence[PageSwap], kept: Sequence[int]) -> None:
        """Read the pages, and give up those of sequences that are not among `kept`."""
        self._saved = {key: pages for key, pages in self._saved.items() if key[0] in kept}
        for swap in swaps:
            ids = np.array(swap.pages, np.int32)
            self._saved[swap.seq, swap.group] = [session.read_pages(cache, ids) for cache in self._of(swap.group)]

    def restore(self, session: Session, swaps: Sequence[PageSwap]) -> list[Transfer]:
        """Write each saved page to its new id, those with the id 0 left out, and forget them."""
        moved = []
        for swap in swaps:
            ids = np.array(swap.pages, np.int32)
            kept = np.flatnonzero(ids)
            for cache, pages in zip(self._of(swap.group), self._saved.pop((swap.seq, swap.group)), strict=True):
                if len(kept):
                    chosen = {name: array[kept] for name, array in pages.items()}
                    moved.append(session.write_pages(cache, ids[kept], chosen))
        return moved

    def _of(self, group: int) -> list[int]:
        return [cache for cache, own in enumerate(self._groups) if own == group]
