"""The pages of one cache group: who is free, who is held how often, and who is kept for its contents.

Knows pages and their hashes, not sequences or tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lineshaft.errors import IntegrityError, InvalidValue, PoolTooSmall


@dataclass(frozen=True)
class GroupSpec:
    """The pool of one cache group. `pages` counts page 0, the null page, which is never allocated."""

    pages: int
    page_size: int  # tokens a page

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise InvalidValue(f"page_size = {self.page_size}: give at least 1 token a page")
        if self.pages < 2:
            raise PoolTooSmall(f"pages = {self.pages} holds no token: give at least 2 (page 0 is the null page)")


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy page src onto page dst of a group, before the step writes anything, in the order given."""

    group: int
    src: int
    dst: int


class PagePool:
    """Every page but 0 is exactly one of: free (nothing of worth), idle (held by nobody, kept for its hash), held.

    Idle pages are given up in the order in which they became idle.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.evictions = 0
        self._holders = [0] * spec.pages
        self._free = list(range(spec.pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
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
            self._evict()
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Add a holder to a held or idle page."""
        if not self._holders[page]:
            del self._idle[page]
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """Take a holder from a held page; the last one leaves it idle if it has a hash, else free."""
        self._holders[page] -= 1
        assert self._holders[page] >= 0, f"page {page} dropped more often than held"
        if self._holders[page]:
            return
        if page in self._hash_of:
            self._idle[page] = None
        else:
            self._free.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Name a held page, unless another held page has the name; an idle one gives it up and is free."""
        other = self._page_of.get(digest)
        if other is not None:
            if other == page or self._holders[other]:
                return
            self._forget(other)
        self._hash_of[page] = digest
        self._page_of[digest] = page

    def reset(self) -> None:
        """Forget every hash: idle pages become free, held ones stay held without a name."""
        for page in list(self._idle):
            self._forget(page)
        self._hash_of.clear()
        self._page_of.clear()

    def check(self, holders: Mapping[int, int]) -> None:
        """Raise IntegrityError unless the books balance. holders: how many sequences hold each page, 0 left out."""
        held = {page: count for page, count in enumerate(self._holders) if count}
        _demand(held == dict(holders), f"pages are held {held}, sequences hold {dict(holders)}")
        parts = [*self._free, *self._idle, *held]
        everything = list(range(1, self.spec.pages))
        _demand(sorted(parts) == everything, "free, idle and held pages do not partition pages 1 and up")
        _demand(all(page in self._hash_of for page in self._idle), "an idle page has no hash")
        _demand(not any(page in self._hash_of for page in self._free), "a free page has a hash")
        inverse = {digest: page for page, digest in self._hash_of.items()}
        _demand(inverse == self._page_of and len(inverse) == len(self._hash_of), "hashes and pages do not match")

    def _evict(self) -> None:
        self._forget(next(iter(self._idle)))
        self.evictions += 1

    def _forget(self, page: int) -> None:
        """Make an idle page free."""
        del self._idle[page]
        del self._page_of[self._hash_of.pop(page)]
        self._free.append(page)


def _demand(holds: bool, broken: str) -> None:
    if not holds:
        raise IntegrityError(f"cache books do not balance: {broken}; this is a bug, please report it")
