"""The cache manager: gives the sequences pages in every cache group, shares prefixes, and copies before a shared write.

Knows sequences as numbers and tokens as integers; nothing of requests, steps or devices.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

from lineshaft.cache.pool import GroupSpec, PageCopy, PagePool
from lineshaft.cache.prefix import PrefixHashes
from lineshaft.errors import IntegrityError, InvalidValue


@dataclass(frozen=True)
class PrefixStats:
    """What the prefix cache did since the manager was made; tokens are counted at `open`."""

    opens: int
    hits: int  # opens that shared at least one page
    queried_tokens: int
    hit_tokens: int
    evictions: int  # pages


@dataclass(slots=True, eq=False)
class _Sequence:
    hashes: PrefixHashes
    epoch: int  # of the prefix cache; pages computed under an older one are never registered
    pages: list[array[int]]  # per group, in token order
    registered: list[int]  # per group, how many leading pages `commit` has seen whole
    computed: int = 0  # tokens whose KV is in the pages; later positions are still to be written
    forked: bool = False  # whether pages that are still to be written may be shared


class CacheManager:
    """Pages for many sequences over several cache groups. Page 0 of each group is the null page, never allocated."""

    def __init__(self, groups: Sequence[GroupSpec], *, prefix_caching: bool = True, watermark: float = 0.01) -> None:
        """watermark: the share of each pool that `reserve=True` keeps free, so that running sequences can grow."""
        if not 0 <= watermark < 1:
            raise InvalidValue(f"watermark = {watermark}: give a share of the pool, >= 0 and < 1")
        self.groups = tuple(groups)
        self.prefix_caching = prefix_caching and bool(groups)
        self._pools = [PagePool(spec) for spec in self.groups]
        self._sizes = [spec.page_size for spec in self.groups]
        self._reserved = [int(watermark * (spec.pages - 1)) for spec in self.groups]
        self._alignment = lcm(*self._sizes)
        self._sequences: dict[int, _Sequence] = {}
        self.writable: dict[int, int] = {}
        """For each open sequence, how many positions are its own to write without another `extend`; read only."""
        self.due: dict[int, int] = {}
        """For each open sequence, the computed count at which `commit` next has something to do; read only."""
        self._epoch = 0
        self._opens = self._hits = self._queried_tokens = self._hit_tokens = 0

    @property
    def capacity(self) -> int:
        """How many tokens one sequence can hold if it has every pool to itself."""
        return min(((spec.pages - 1) * spec.page_size for spec in self.groups), default=sys.maxsize)

    @property
    def stats(self) -> PrefixStats:
        """The prefix cache's counters, now."""
        evictions = sum(pool.evictions for pool in self._pools)
        return PrefixStats(self._opens, self._hits, self._queried_tokens, self._hit_tokens, evictions)

    def pages(self, seq: int, group: int = 0) -> array[int]:
        """Return the sequence's pages in token order: a live array, not to be changed or kept a view of."""
        return self._sequences[seq].pages[group]

    def free_pages(self, group: int = 0) -> int:
        """Return how many pages can be allocated: free ones, and idle ones that are kept only for their prefix."""
        return self._pools[group].available

    def used_pages(self, group: int = 0) -> int:
        """Return how many pages sequences hold."""
        return self.groups[group].pages - 1 - self.free_pages(group)

    def unused_pages(self, group: int = 0) -> Sequence[int]:
        """Return the pages that hold nothing of worth: neither held nor kept for their prefix; never the null page."""
        return self._pools[group].unused

    def hashes(self, salt: bytes = b"") -> PrefixHashes:
        """Return hashes for a sequence that may be tried, opened and closed several times: each page is hashed once."""
        return PrefixHashes(self._sizes, salt)

    def can_admit(
        self, tokens: Sequence[int], hashes: PrefixHashes, *, reserve: bool = False, read: bool = True
    ) -> bool:
        """Return whether `open` and then `extend` over all of tokens would succeed now. Changes nothing."""
        cached = self._cached(tokens, hashes) if read else 0
        for pool, size, reserved in zip(self._pools, self._sizes, self._reserved, strict=True):
            shared = [pool.find(digest) for digest in hashes.known(size)[: cached // size]]
            revived = sum(1 for page in shared if page is not None and not pool.holders(page))
            needed = _ceil(len(tokens), size) - len(shared) + revived
            if needed + (reserved if reserve else 0) > pool.available:
                return False
        return True

    def open(
        self,
        seq: int,
        tokens: Sequence[int],
        salt: bytes = b"",
        hashes: PrefixHashes | None = None,
        *,
        read: bool = True,
    ) -> int:
        """Start a sequence on the pages of its longest cached prefix; return how many tokens that spares.

        The prefix is whole pages in every group and leaves at least one token to compute. hashes: from an earlier
        `hashes(salt)` of this very sequence, to save hashing again; salt is then not read. read=False: on no cached
        prefix, whose tokens give no logits.
        """
        assert seq not in self._sequences, f"sequence {seq} is open already"
        hashes = hashes or self.hashes(salt)
        cached = self._cached(tokens, hashes) if read else 0
        pages = [self._share(pool, hashes, cached // pool.spec.page_size) for pool in self._pools]
        registered = [len(group) for group in pages]
        self._sequences[seq] = sequence = _Sequence(hashes, self._epoch, pages, registered, computed=cached)
        self._note(seq, sequence)
        self._opens += 1
        self._hits += cached > 0
        self._queried_tokens += len(tokens)
        self._hit_tokens += cached
        return cached

    def extend(self, seq: int, total: int, *, reserve: bool = False) -> list[PageCopy] | None:
        """Make the positions from the computed count up to total writable by this sequence alone.

        Return the copies to make before the write; or None, with nothing changed, when pages are lacking. reserve
        also keeps the watermark free.
        """
        sequence = self._sequences[seq]
        shared = self._shared_ahead(sequence, total) if sequence.forked else []
        grow = [_ceil(total, size) - len(pages) for size, pages in zip(self._sizes, sequence.pages, strict=True)]
        if not shared and max(grow, default=0) <= 0:
            return []
        if not self._enough(grow, shared, reserve):
            return None
        copies = [self._copy_on_write(sequence, group, index) for group, index in shared]
        for pool, pages, count in zip(self._pools, sequence.pages, grow, strict=True):
            pages.extend(pool.allocate() for _ in range(count))
        self._note(seq, sequence)
        return copies

    def commit(self, seq: int, tokens: Sequence[int], computed: int) -> None:
        """Note that tokens[:computed] have their KV now, and register the pages that this made whole.

        A caller in a hurry may leave out the calls with a computed count below `due[seq]`.
        """
        sequence = self._sequences[seq]
        assert computed >= sequence.computed, "computed tokens cannot become fewer"
        sequence.computed = computed
        self._note(seq, sequence)
        if not self.prefix_caching or sequence.epoch != self._epoch:
            return
        for group, size in enumerate(self._sizes):
            whole = computed // size
            if whole > sequence.registered[group]:
                self._register(sequence, group, tokens, whole)

    def fork(self, parent: int, child: int) -> None:
        """Start child as a copy of parent, on the same pages. `extend` both before either writes again."""
        assert child not in self._sequences, f"sequence {child} is open already"
        source = self._sequences[parent]
        for pool, shared in zip(self._pools, source.pages, strict=True):
            for page in shared:
                pool.hold(page)
        source.forked = True
        self._sequences[child] = copy = replace(
            source,
            hashes=source.hashes.fork(source.computed),
            pages=[pages[:] for pages in source.pages],
            registered=list(source.registered),
        )
        self._note(parent, source)
        self._note(child, copy)

    def close(self, seq: int) -> None:
        """End a sequence. Its registered pages stay as cache and are evicted deepest first, oldest sequence first."""
        del self.writable[seq], self.due[seq]
        for pool, pages in zip(self._pools, self._sequences.pop(seq).pages, strict=True):
            for page in reversed(pages):
                pool.drop(page)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; what open sequences have computed so far or compute later is not cached."""
        self._epoch += 1
        for pool in self._pools:
            pool.reset()

    def check_integrity(self) -> None:
        """Raise IntegrityError unless sequences and pools agree on every page and hash. Costs time: for tests, idle."""
        for group, pool in enumerate(self._pools):
            held = Counter(page for sequence in self._sequences.values() for page in sequence.pages[group])
            pool.check(held)
            for seq, sequence in self._sequences.items():
                self._check_hashes(seq, sequence, group)

    def _cached(self, tokens: Sequence[int], hashes: PrefixHashes) -> int:
        """Return the length of the longest cached prefix of tokens, the last token left out."""
        if not self.prefix_caching:
            return 0
        cached = max(0, len(tokens) - 1)
        for pool, size in zip(self._pools, self._sizes, strict=True):
            whole = cached // size
            chain = hashes.chain(size, tokens, whole)
            hits = next((page for page in range(whole) if pool.find(chain[page]) is None), whole)
            cached = hits * size
        return cached - cached % self._alignment

    def _share(self, pool: PagePool, hashes: PrefixHashes, count: int) -> array[int]:
        pages = array("i")
        for digest in hashes.known(pool.spec.page_size)[:count]:
            page = pool.find(digest)
            assert page is not None, "a cached prefix lost a page"
            pool.hold(page)
            pages.append(page)
        return pages

    def _note(self, seq: int, sequence: _Sequence) -> None:
        """Bring `writable` and `due` up to date."""
        held = min((len(p) * size for p, size in zip(sequence.pages, self._sizes, strict=True)), default=sys.maxsize)
        if sequence.forked and not (shared := self._shared_ahead(sequence, held)):
            sequence.forked = False
        self.writable[seq] = min([i * self._sizes[g] for g, i in shared]) if sequence.forked else held
        self.due[seq] = (
            min((sequence.computed // size + 1) * size for size in self._sizes) if self._sizes else sys.maxsize
        )

    def _shared_ahead(self, sequence: _Sequence, total: int) -> list[tuple[int, int]]:
        """Return (group, index) of the pages that hold positions from computed to total and have another holder."""
        shared = []
        for group, (pool, size, pages) in enumerate(zip(self._pools, self._sizes, sequence.pages, strict=True)):
            for index in range(sequence.computed // size, min(_ceil(total, size), len(pages))):
                if pool.holders(pages[index]) > 1:
                    shared.append((group, index))
        return shared

    def _enough(self, grow: Sequence[int], shared: Sequence[tuple[int, int]], reserve: bool) -> bool:
        copied = Counter(group for group, _ in shared)
        return all(
            max(count, 0) + copied[group] + (self._reserved[group] if reserve else 0) <= self._pools[group].available
            for group, count in enumerate(grow)
        )

    def _copy_on_write(self, sequence: _Sequence, group: int, index: int) -> PageCopy:
        pool, pages = self._pools[group], sequence.pages[group]
        src = pages[index]
        pages[index] = pool.allocate()
        pool.drop(src)
        return PageCopy(group, src, pages[index])

    def _register(self, sequence: _Sequence, group: int, tokens: Sequence[int], whole: int) -> None:
        chain = sequence.hashes.chain(self._sizes[group], tokens, whole)
        for index in range(sequence.registered[group], whole):
            self._pools[group].register(sequence.pages[group][index], chain[index])
        sequence.registered[group] = whole

    def _check_hashes(self, seq: int, sequence: _Sequence, group: int) -> None:
        chain = sequence.hashes.known(self._sizes[group])
        for index, page in enumerate(sequence.pages[group]):
            digest = self._pools[group].hash_of(page)
            named = sequence.epoch == self._epoch and index < sequence.registered[group]
            if digest is not None and not (named and digest == chain[index]):
                raise IntegrityError(
                    f"page {page} of group {group} is named for other tokens than sequence {seq} has at page {index}; "
                    "this is a bug, please report it"
                )


def _ceil(total: int, size: int) -> int:
    return -(-total // size)
