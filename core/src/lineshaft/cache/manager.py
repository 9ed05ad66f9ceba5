"""The cache manager: gives the sequences pages in every cache group, shares prefixes, and copies before a shared write.

Knows sequences as numbers and tokens as integers; nothing of requests, steps or devices.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import lcm

from lineshaft.cache.eviction import EVICTION
from lineshaft.cache.pool import GroupSpec, PageCopy, PagePool, PageSwap, demand, pages_for
from lineshaft.cache.prefix import PrefixHashes
from lineshaft.errors import InvalidValue


@dataclass(frozen=True)
class PrefixStats:
    """What the prefix cache did since the manager was made; tokens are counted at `open`."""

    opens: int
    hits: int  # opens that shared at least one page
    partial_hits: int  # hits that shared fewer whole pages than the sequence had
    queried_tokens: int
    hit_tokens: int
    evictions: int  # pages

    @property
    def hit_rate(self) -> float:
        """The share of tokens that were found; 0 before the first."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0


@dataclass(slots=True, eq=False)
class _Sequence:
    hashes: PrefixHashes
    epoch: int  # of the prefix cache; pages computed under an older one are never registered
    number: int  # how many sequences were opened before it
    pages: list[array[int]]  # per group, in token order; 0 where a page fell out of the group's window
    registered: list[int]  # per group, how many leading pages are whole, or will be after the steps that are scheduled
    unseen: list[int]  # per group, how many leading pages fell out of the window
    computed: int = 0  # tokens whose KV is in the pages; later positions are still to be written
    forked: bool = False  # whether pages that are still to be written may be shared
    saved: list[list[int]] = field(default_factory=list)  # per group, which pages are on the host; empty: none


class CacheManager:
    """Pages for many sequences over several cache groups. Page 0 of each group is the null page, never allocated.

    A group with a window holds, of each sequence, what its next steps can see and write: pages that fell out of the
    window are given up by `commit`, and `extend` gives pages for the next `chunk` tokens, not for all of them.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        *,
        prefix_caching: bool = True,
        watermark: float = 0.01,
        chunk: int | None = None,
        eviction: str = "lru",
        swap_pages: int = 0,
    ) -> None:
        """watermark: the share of each pool that `reserve=True` keeps free, so that running sequences can grow. chunk:
        the most tokens of a sequence in one step; None: any. swap_pages: room on the host, over all groups.
        """
        if not 0 <= watermark < 1:
            raise InvalidValue(f"watermark = {watermark}: give a share of the pool, >= 0 and < 1")
        if eviction not in EVICTION:
            raise InvalidValue(f"eviction = {eviction!r}: give one of {', '.join(EVICTION)}")
        self.groups = tuple(groups)
        self.prefix_caching = prefix_caching and bool(groups)
        self.swap_pages_left = swap_pages
        self.writable: dict[int, int] = {}
        """For each open sequence, how many positions are its own to write without another `extend`; read only."""
        self.due: dict[int, int] = {}
        """For each open sequence, the computed count at which `commit` next has something to do; read only."""
        self._swap_pages = swap_pages
        self._chunk = sys.maxsize // 4 if chunk is None else chunk
        self._pools = [PagePool(spec, eviction) for spec in self.groups]
        self._sizes = [spec.page_size for spec in self.groups]
        self._reserved = [int(watermark * (spec.pages - 1)) for spec in self.groups]
        self._alignment = lcm(*self._sizes)
        self._sequences: dict[int, _Sequence] = {}
        self._epoch = 0
        self._opens = self._hits = self._partial_hits = self._queried_tokens = self._hit_tokens = 0

    @property
    def capacity(self) -> int:
        """How many tokens one sequence can hold if it has every pool to itself."""
        return min((spec.capacity(self._chunk) for spec in self.groups), default=sys.maxsize)

    @property
    def stats(self) -> PrefixStats:
        """The prefix cache's counters, now."""
        evictions = sum(pool.evictions for pool in self._pools)
        hits = self._hits, self._partial_hits
        return PrefixStats(self._opens, *hits, self._queried_tokens, self._hit_tokens, evictions)

    def pages_needed(self, total: int) -> int:
        """Return how many pages a sequence of total tokens holds at most, over all groups."""
        return sum(spec.most(total, self._chunk) for spec in self.groups)

    def pages_held(self, seq: int) -> int:
        """Return how many pages a sequence holds now, shared or not, over all groups."""
        return sum(
            len(p) - lost for p, lost in zip(self._sequences[seq].pages, self._sequences[seq].unseen, strict=True)
        )

    def pages(self, seq: int, group: int = 0) -> array[int]:
        """Return the sequence's pages in token order: a live array, not to be changed or kept a view of.

        0 stands where a page fell out of the group's window.
        """
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

    # ---- opening -----------------------------------------------------------------------------------------------

    def hashes(self, salt: bytes = b"") -> PrefixHashes:
        """Return hashes for a sequence that may be tried, opened and closed several times: each page is hashed once."""
        return PrefixHashes(self._sizes, salt)

    def cached(self, tokens: Sequence[int], hashes: PrefixHashes) -> int:
        """Return how many tokens `open` would spare now: of the longest cached prefix, the last token left out.

        Of a group with a window only those pages are asked for that the next token sees.
        """
        if not self.prefix_caching:
            return 0
        cached = max(0, len(tokens) - 1)
        for pool in self._pools:
            if not pool.spec.window:
                size = pool.spec.page_size
                whole = cached // size
                chain = hashes.chain(size, tokens, whole)
                cached = next((page for page in range(whole) if pool.find(chain[page]) is None), whole) * size
        cached -= cached % self._alignment
        while cached and (missing := self._missing(tokens, hashes, cached)) is not None:
            cached = missing - missing % self._alignment
        return cached

    def can_admit(
        self, tokens: Sequence[int], hashes: PrefixHashes, *, reserve: bool = False, read: bool = True
    ) -> bool:
        """Return whether `open` and then `extend` over all of tokens would succeed now. Changes nothing."""
        cached = self.cached(tokens, hashes) if read else 0
        grow = []
        for pool, end in zip(self._pools, self._ends(len(tokens), cached), strict=True):
            whole = cached // pool.spec.page_size
            shared = hashes.known(pool.spec.page_size)[pool.spec.unseen(cached) : whole]
            grow.append(end - whole + self._revived(pool, shared))
        return self._enough(grow, reserve)

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
        cached = self.cached(tokens, hashes) if read else 0
        unseen = [spec.unseen(cached) for spec in self.groups]
        pages = [self._share(pool, hashes, n, cached) for pool, n in zip(self._pools, unseen, strict=True)]
        registered = [len(group) for group in pages]
        sequence = _Sequence(hashes, self._epoch, self._opens, pages, registered, unseen, computed=cached)
        self._sequences[seq] = sequence
        self._note(seq, sequence)
        self._opens += 1
        self._hits += cached > 0
        self._partial_hits += 0 < cached < (len(tokens) - 1) // self._alignment * self._alignment
        self._queried_tokens += len(tokens)
        self._hit_tokens += cached
        return cached

    def can_fork(self, parent: int, tokens: int) -> bool:
        """Return whether the parent, open and not swapped, still has every page that its token at `tokens` sees."""
        unseen = self._sequences[parent].unseen
        return all(lost <= spec.unseen(tokens) for spec, lost in zip(self.groups, unseen, strict=True))

    def has_room(self, tokens: int, total: int, *, reserve: bool = False) -> bool:
        """Return whether a child of `fork(..., tokens)` could be extended to total now."""
        ends = self._ends(total, tokens)
        return self._enough([end - tokens // size for end, size in zip(ends, self._sizes, strict=True)], reserve)

    def fork(self, parent: int, child: int, tokens: int | None = None) -> None:
        """Start child on the pages of the parent's first `tokens` computed tokens, by default of all.

        `extend` both before either writes again: a shared page is copied then.
        """
        assert child not in self._sequences, f"sequence {child} is open already"
        source = self._sequences[parent]
        pages = [group[:] for group in source.pages]
        if tokens is not None:
            pages = [group[: pages_for(tokens, size)] for group, size in zip(pages, self._sizes, strict=True)]
        tokens = source.computed if tokens is None else tokens
        for pool, shared in zip(self._pools, pages, strict=True):
            for page in filter(None, shared):
                pool.hold(page)
        source.forked = True
        self._sequences[child] = copy = replace(
            source,
            hashes=source.hashes.fork(tokens),
            pages=pages,
            registered=[min(n, tokens // size) for n, size in zip(source.registered, self._sizes, strict=True)],
            unseen=list(source.unseen),
            computed=tokens,
        )
        self._note(parent, source)
        self._note(child, copy)

    # ---- growing -----------------------------------------------------------------------------------------------

    def extend(self, seq: int, total: int, *, start: int | None = None, reserve: bool = False) -> list[PageCopy] | None:
        """Make the positions from the computed count up to total writable by this sequence alone.

        In a group with a window, only the next chunk of them: from `start` on, by default the computed count. Return
        the copies to make before the write; or None, with nothing changed, when pages are lacking. reserve also keeps
        the watermark free.
        """
        sequence = self._sequences[seq]
        shared = self._shared_ahead(sequence, total) if sequence.forked else []
        ends = self._ends(total, sequence.computed if start is None else start)
        grow = [max(0, end - len(pages)) for end, pages in zip(ends, sequence.pages, strict=True)]
        if not shared and not any(grow):
            if sequence.forked:
                self._note(seq, sequence)
            return []
        copied = Counter(group for group, _ in shared)
        if not self._enough([count + copied[group] for group, count in enumerate(grow)], reserve):
            return None
        copies = [self._copy_on_write(sequence, group, index) for group, index in shared]
        for pool, pages, count in zip(self._pools, sequence.pages, grow, strict=True):
            pages.extend(pool.allocate() for _ in range(count))
        self._note(seq, sequence)
        return copies

    def share(self, seq: int, tokens: Sequence[int], scheduled: int) -> list[tuple[int, bytes]]:
        """Register the pages that are whole once tokens[:scheduled] have their KV; return their groups and hashes.

        That may be before they have it: who is opened on them runs in the step that computes them or a later one, and
        every attention of a step reads what all its rows have written. If the step fails, or is never run, `forget`.
        """
        sequence = self._sequences[seq]
        if not self.prefix_caching or sequence.epoch != self._epoch:
            return []
        return [
            (group, digest)
            for group, size in enumerate(self._sizes)
            if scheduled // size > sequence.registered[group]
            for digest in self._register(sequence, group, tokens, scheduled // size)
        ]

    def forget(self, shared: Iterable[tuple[int, bytes]]) -> None:
        """Take back what `share` returned, once every sequence that was opened since is closed."""
        for group, digest in shared:
            self._pools[group].forget(digest)

    def commit(self, seq: int, tokens: Sequence[int], computed: int) -> None:
        """Note that tokens[:computed] have their KV now: register the pages that this made whole, and give up those
        that fell out of a window.

        A caller in a hurry may leave out the calls with a computed count below `due[seq]`.
        """
        sequence = self._sequences[seq]
        assert computed >= sequence.computed, "computed tokens cannot become fewer"
        sequence.computed = computed
        self.share(seq, tokens, computed)
        for group, spec in enumerate(self.groups):
            if spec.window:
                self._give_up(sequence, group, spec.unseen(computed))
        self._note(seq, sequence)

    def close(self, seq: int) -> None:
        """End a sequence, also one on the host. Its registered pages stay as cache, its deepest to be evicted first."""
        sequence = self._sequences.pop(seq)
        self._drop_pages(sequence)
        self.swap_pages_left += sum(map(len, sequence.saved))
        self.writable.pop(seq, None), self.due.pop(seq, None)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; what open sequences have computed so far or compute later is not cached."""
        self._epoch += 1
        for pool in self._pools:
            pool.reset()

    @property
    def on_host(self) -> list[int]:
        """The sequences whose pages are saved on the host."""
        return [seq for seq, sequence in self._sequences.items() if sequence.saved]

    # ---- swapping ----------------------------------------------------------------------------------------------

    def swap_out(self, seq: int, computed: int) -> list[PageSwap] | None:
        """Give up a sequence's pages, the first `computed` tokens of which are to be saved to the host before the next
        step; None, with nothing changed, where the host has no room."""
        sequence = self._sequences[seq]
        ends = [pages_for(computed, size) for size in self._sizes]
        pages = zip(sequence.pages, sequence.unseen, ends, strict=True)
        saved = [list(range(lost, min(end, len(group)))) for group, lost, end in pages]
        count = sum(map(len, saved))
        if count > self.swap_pages_left:
            return None
        self.swap_pages_left -= count
        swaps = [PageSwap(seq, g, tuple(sequence.pages[g][i] for i in kept)) for g, kept in enumerate(saved)]
        self._drop_pages(sequence)
        sequence.pages = [array("i") for _ in self._pools]
        sequence.saved, sequence.computed, sequence.forked = saved, computed, False
        del self.writable[seq], self.due[seq]
        return swaps

    def swap_in(self, seq: int, total: int, *, reserve: bool = False) -> list[PageSwap] | None:
        """Give a swapped sequence pages for all of total, and say which contents are to be brought back before the
        next step; None, with nothing changed, when pages are lacking."""
        sequence = self._sequences[seq]
        found = [self._still_cached(sequence, group) for group in range(len(self._pools))]
        grow = []
        for pool, end, pages in zip(self._pools, self._ends(total, sequence.computed), found, strict=True):
            fresh = sum(page == 0 for page in pages.values())
            idle = sum(page > 0 and not pool.holders(page) for page in pages.values())
            grow.append(max(0, end - pages_for(sequence.computed, pool.spec.page_size)) + fresh + idle)
        if not self._enough(grow, reserve):
            return None
        swaps = [PageSwap(seq, g, self._restore(sequence, g, pages)) for g, pages in enumerate(found)]
        self.swap_pages_left += sum(map(len, sequence.saved))
        sequence.saved = []
        self._note(seq, sequence)
        self.extend(seq, total)
        return swaps

    def _still_cached(self, sequence: _Sequence, group: int) -> dict[int, int]:
        """For each saved page its index, and for those before the first lost one the page that has its contents; 0."""
        pool, chain = self._pools[group], sequence.hashes.known(self._sizes[group])
        named = sequence.registered[group] if sequence.epoch == self._epoch else 0
        found = {i: pool.find(chain[i]) or 0 if i < named else 0 for i in sequence.saved[group]}
        lost = next((i for i, page in found.items() if not page), named)
        return {i: page if i < lost else 0 for i, page in found.items()}

    def _restore(self, sequence: _Sequence, group: int, found: dict[int, int]) -> tuple[int, ...]:
        """Take or allocate a page for each saved one; return those whose contents are to be brought back.

        They are named again by the next `commit`, when their contents are there.
        """
        pool, pages = self._pools[group], sequence.pages[group]
        pages.extend([0] * sequence.unseen[group])
        for page in filter(None, found.values()):
            pool.hold(page)  # before anything is allocated, which may evict it
        restored = []
        for page in found.values():
            pages.append(page or pool.allocate())
            restored.append(0 if page else pages[-1])
        whole = sequence.registered[group]
        sequence.registered[group] = min(whole, next((i for i, page in found.items() if not page), whole))
        return tuple(restored)

    # ---- books -------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise IntegrityError unless sequences and pools agree on every page and hash. Costs time: for tests, idle."""
        for group, pool in enumerate(self._pools):
            held = Counter(page for sequence in self._sequences.values() for page in sequence.pages[group])
            nulls = sum(s.unseen[group] for s in self._sequences.values() if not s.saved)
            demand(held.pop(0, 0) == nulls, f"a page of group {group} that is still seen is null")
            pool.check(held)
            for seq, sequence in self._sequences.items():
                self._check_hashes(seq, sequence, group)
        saved = sum(len(pages) for sequence in self._sequences.values() for pages in sequence.saved)
        demand(saved + self.swap_pages_left == self._swap_pages, "pages saved to the host are miscounted")
        open_here = {seq for seq, sequence in self._sequences.items() if not sequence.saved}
        demand(open_here == set(self.writable) == set(self.due), "a sequence's limits are missing")

    def _missing(self, tokens: Sequence[int], hashes: PrefixHashes, cached: int) -> int | None:
        """Where a page begins that a token at position `cached` sees in a group with a window and that is not there."""
        for pool in self._pools:
            if pool.spec.window:
                size = pool.spec.page_size
                chain = hashes.chain(size, tokens, cached // size)
                for page in range(cached // size - 1, pool.spec.unseen(cached) - 1, -1):
                    if pool.find(chain[page]) is None:
                        return page * size
        return None

    def _ends(self, total: int, start: int) -> list[int]:
        """How many pages each group needs for a sequence of total tokens whose next row starts at `start`."""
        return [
            pages_for(min(total, start + self._chunk) if spec.window else total, spec.page_size) for spec in self.groups
        ]

    def _revived(self, pool: PagePool, digests: Sequence[bytes]) -> int:
        """How many of these cached pages nobody holds yet."""
        pages = [pool.find(digest) for digest in digests]
        return sum(1 for page in pages if page is not None and not pool.holders(page))

    def _share(self, pool: PagePool, hashes: PrefixHashes, unseen: int, cached: int) -> array[int]:
        size = pool.spec.page_size
        pages = array("i", [0]) * unseen
        for digest in hashes.known(size)[unseen : cached // size]:
            page = pool.find(digest)
            assert page is not None, "a cached prefix lost a page"
            pool.hold(page)
            pages.append(page)
        return pages

    def _note(self, seq: int, sequence: _Sequence) -> None:
        """Bring `writable` and `due` up to date."""
        held = min((len(p) * size for p, size in zip(sequence.pages, self._sizes, strict=True)), default=sys.maxsize)
        shared = self._shared_ahead(sequence, held) if sequence.forked else []
        sequence.forked = bool(shared)
        self.writable[seq] = min((index * self._sizes[group] for group, index in shared), default=held)
        self.due[seq] = min((spec.next_change(sequence.computed) for spec in self.groups), default=sys.maxsize)

    def _shared_ahead(self, sequence: _Sequence, total: int) -> list[tuple[int, int]]:
        """Return (group, index) of the pages that hold positions from computed to total and have another holder."""
        shared = []
        for group, (pool, size, pages) in enumerate(zip(self._pools, self._sizes, sequence.pages, strict=True)):
            for index in range(sequence.computed // size, min(pages_for(total, size), len(pages))):
                if pool.holders(pages[index]) > 1:
                    shared.append((group, index))
        return shared

    def _enough(self, grow: Sequence[int], reserve: bool) -> bool:
        pools = zip(grow, self._reserved, self._pools, strict=True)
        return all(not n or n + (reserved if reserve else 0) <= pool.available for n, reserved, pool in pools)

    def _copy_on_write(self, sequence: _Sequence, group: int, index: int) -> PageCopy:
        pool, pages = self._pools[group], sequence.pages[group]
        src = pages[index]
        pages[index] = pool.allocate()
        pool.drop(src)
        return PageCopy(group, src, pages[index])

    def _register(self, sequence: _Sequence, group: int, tokens: Sequence[int], whole: int) -> Sequence[bytes]:
        chain, first = sequence.hashes.chain(self._sizes[group], tokens, whole), sequence.registered[group]
        for index in range(first, whole):
            self._pools[group].register(sequence.pages[group][index], chain[index], (sequence.number, -index))
        sequence.registered[group] = whole
        return chain[first:whole]

    def _give_up(self, sequence: _Sequence, group: int, unseen: int) -> None:
        pages = sequence.pages[group]
        for index in range(sequence.unseen[group], unseen):
            self._pools[group].drop(pages[index])
            pages[index] = 0
        sequence.unseen[group] = unseen

    def _drop_pages(self, sequence: _Sequence) -> None:
        for pool, pages in zip(self._pools, sequence.pages, strict=True):
            for page in filter(None, reversed(pages)):
                pool.drop(page)

    def _check_hashes(self, seq: int, sequence: _Sequence, group: int) -> None:
        chain = sequence.hashes.known(self._sizes[group])
        for index, page in enumerate(sequence.pages[group]):
            digest = self._pools[group].hash_of(page)
            # A page beyond those that the sequence named itself can have been named by another that shares it.
            known = chain[index] == digest if index < len(chain) else self._pools[group].holders(page) > 1
            right = digest is None or (sequence.epoch == self._epoch and known)
            demand(right, f"page {page} of group {group} is named for other tokens than sequence {seq} has at {index}")
