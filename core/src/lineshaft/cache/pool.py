"""The pages of one cache group: who is free, who is held how often, and who is kept for its contents.

Knows pages and their hashes, not sequences or tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lineshaft.cache.eviction import EVICTION, Born, IdlePages
from lineshaft.errors import IntegrityError, InvalidValue, PoolTooSmall


def pages_for(tokens: int, page_size: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // page_size)


def pages_in_window(window: int, page_size: int, chunk: int) -> int:
    """The most pages that one sequence holds in a group of this window, in steps of at most `chunk` of its tokens.

    What the first query of a step that is not committed yet sees, that step's tokens, and those of the step after it.
    """
    return pages_for(window - 1 + 2 * chunk, page_size) + 1


@dataclass(frozen=True)
class GroupSpec:
    """The pool of one cache group. `pages` counts page 0, the null page, which is never allocated."""

    pages: int
    page_size: int  # tokens a page
    window: int = 0  # keys that a query sees, itself included; 0: all before it

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise InvalidValue(f"page_size = {self.page_size}: give at least 1 token a page")
        if self.window < 0:
            raise InvalidValue(f"window = {self.window}: give at least 1 key that a query sees, or 0 for all")
        if self.pages < 2:
            raise PoolTooSmall(f"pages = {self.pages} holds no token: give at least 2 (page 0 is the null page)")

    def capacity(self, chunk: int) -> int:
        """How many tokens one sequence can hold if it has the pool to itself."""
        if self.window and self.pages - 1 >= pages_in_window(self.window, self.page_size, chunk):
            return sys.maxsize
        return (self.pages - 1) * self.page_size

    def most(self, total: int, chunk: int) -> int:
        """The most pages that a sequence of total tokens holds at once."""
        whole = pages_for(total, self.page_size)
        return min(whole, pages_in_window(self.window, self.page_size, chunk)) if self.window else whole

    def unseen(self, computed: int) -> int:
        """How many leading pages no token from position `computed` on can see."""
        return max(0, computed - self.window + 1) // self.page_size if self.window else 0

    def next_change(self, computed: int) -> int:
        """The computed count at which another page is whole or unseen."""
        whole = (computed // self.page_size + 1) * self.page_size
        if not self.window:
            return whole
        return min(whole, (self.unseen(computed) + 1) * self.page_size + self.window - 1)


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy page src onto page dst of a group, before the step writes anything, in the order given."""

    group: int
    src: int
    dst: int


class PageSwap(NamedTuple):
    """Pages of a sequence in one group, to be saved to the host or brought back from there, before a step."""

    seq: int
    group: int
    pages: tuple[int, ...]  # in token order; coming back in the same order, with 0 for one that need not


class PagePool:
    """Every page but 0 is exactly one of: free (nothing of worth), idle (held by nobody, kept for its hash), held.

    Idle pages are given up in the order of the eviction policy.
    """

    def __init__(self, spec: GroupSpec, eviction: str = "lru") -> None:
        self.spec = spec
        self.evictions = 0
        self._holders = [0] * spec.pages
        self._free = list(range(spec.pages - 1, 0, -1))
        self._idle = IdlePages(EVICTION[eviction])
        self._uses = [0] * spec.pages
        self._born: dict[int, Born] = {}
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many pages `allocate` can hand out."""
        return len(self._free) + len(self._idle)

    @property
    def unused(self) -> Sequence[int]:
        """The free pages: held by nobody and kept for nothing."""
        return tuple(self._free)

    def holders(self, page: int) -> int:
        """Return how many sequences hold the page."""
        return self._holders[page]

    def find(self, digest: bytes) -> int | None:
        """Return the page with this hash, or None."""
        return self._page_of.get(digest)

    def hash_of(self, page: int) -> bytes | None:
        """Return the hash under which the page is registered, or None."""
        return self._hash_of.get(page)

    def allocate(self) -> int:
        """Return a page held once, with contents of no meaning. The caller has seen that `available` > 0."""
        if not self._free:
            self._forget(self._idle.first())
            self.evictions += 1
        page = self._free.pop()
        self._holders[page] = 1
        self._uses[page] = 0
        return page

    def hold(self, page: int) -> None:
        """Add a holder to a held or idle page."""
        if not self._holders[page]:
            self._idle.remove(page)
        self._holders[page] += 1
        self._uses[page] += 1

    def drop(self, page: int) -> None:
        """Take a holder from a held page; the last one leaves it idle if it has a hash, else free."""
        self._holders[page] -= 1
        assert self._holders[page] >= 0, f"page {page} dropped more often than held"
        if self._holders[page]:
            return
        if page in self._hash_of:
            self._idle.add(page, self._born[page], self._uses[page])
        else:
            self._free.append(page)

    def register(self, page: int, digest: bytes, born: Born) -> None:
        """Name a held page, unless another held page has the name; an idle one gives it up and is free."""
        other = self._page_of.get(digest)
        if other is not None:
            if other == page or self._holders[other]:
                return
            self._forget(other)
        self._hash_of[page] = digest
        self._page_of[digest] = page
        self._born[page] = born

    def forget(self, digest: bytes) -> None:
        """Take a hash back; no-op if no page has it."""
        page = self._page_of.get(digest)
        if page is not None and self._holders[page]:
            del self._hash_of[page], self._page_of[digest]
        elif page is not None:
            self._forget(page)

    def reset(self) -> None:
        """Forget every hash: idle pages become free, held ones stay held without a name."""
        for page in list(self._idle):
            self._forget(page)
        self._hash_of.clear()
        self._page_of.clear()

    def check(self, holders: Mapping[int, int]) -> None:
        """Raise IntegrityError unless the books balance. holders: how many sequences hold each page, 0 left out."""
        held = {page: count for page, count in enumerate(self._holders) if count}
        demand(held == dict(holders), f"pages are held {held}, sequences hold {dict(holders)}")
        parts = [*self._free, *self._idle, *held]
        everything = list(range(1, self.spec.pages))
        demand(sorted(parts) == everything, "free, idle and held pages do not partition pages 1 and up")
        demand(all(page in self._hash_of for page in self._idle), "an idle page has no hash")
        demand(not any(page in self._hash_of for page in self._free), "a free page has a hash")
        inverse = {digest: page for page, digest in self._hash_of.items()}
        demand(inverse == self._page_of and len(inverse) == len(self._hash_of), "hashes and pages do not match")

    def _forget(self, page: int) -> None:
        """Make an idle page free."""
        self._idle.remove(page)
        del self._page_of[self._hash_of.pop(page)]
        self._free.append(page)


def demand(holds: bool, broken: str) -> None:
    """Raise IntegrityError, with what is broken, unless it holds."""
    if not holds:
        raise IntegrityError(f"cache books do not balance: {broken}; this is a bug, please report it")
