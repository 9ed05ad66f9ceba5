"""The cache manager under 100 000 random operations, against a shadow device that stores a value a position.

The value of a position is a function of salt, tokens so far and weights, so a page that is shared wrongly, written
while shared, reused too early or copied wrongly reads back as something else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from lineshaft.cache import CacheManager, GroupSpec

GROUPS = (
    GroupSpec(pages=26, page_size=4),
    GroupSpec(pages=18, page_size=6),
    GroupSpec(pages=20, page_size=4, window=9),
)
SWAP_PAGES = 40
MAX_TOKENS = 60


@dataclass
class ShadowSequence:
    salt: bytes
    tokens: list[int]
    values: list[int]  # of the computed positions
    writable: int = 0


@dataclass
class Shadow:
    """Drives a manager with random operations; `counts` says how often each really happened."""

    rng: random.Random
    cache: CacheManager = field(default_factory=lambda: CacheManager(GROUPS, watermark=0.1, swap_pages=SWAP_PAGES))
    memory: dict[tuple[int, int, int], int] = field(default_factory=dict)
    sequences: dict[int, ShadowSequence] = field(default_factory=dict)
    swapped: dict[int, tuple[ShadowSequence, list[list[list[int]]]]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    next_id: int = 0

    def count(self, event: str, times: int = 1) -> None:
        self.counts[event] = self.counts.get(event, 0) + times

    def step(self) -> None:
        operations = [
            self.open, self.extend, self.extend, self.commit, self.commit, self.append, self.fork, self.close,
            self.swap_out, self.swap_in,
        ]  # fmt: skip
        weights = [3 if len(self.sequences) < 8 else 0, 3, 3, 3, 3, 2, 0.4, 1.2, 0.3, 0.5]
        if self.rng.random() < 0.002:
            self.reset()
        elif not self.sequences:
            self.open()
        else:
            self.rng.choices(operations, weights)[0]()

    def pick(self) -> int:
        return self.rng.choice(list(self.sequences))

    def open(self) -> None:
        seed, length = self.rng.randrange(4), self.rng.randint(1, 40)
        tokens = [random.Random(seed * 100 + i // 8).randrange(50) for i in range(length)]
        if self.rng.random() < 0.3:
            tokens[self.rng.randrange(length)] += 1
        salt = self.rng.choice([b"", b"", b"salt"])
        seq, self.next_id = self.next_id, self.next_id + 1
        hashes = self.cache.hashes(salt)
        admissible = self.cache.can_admit(tokens, hashes, reserve=True)
        cached = self.cache.open(seq, tokens, hashes=hashes) if seq % 2 else self.cache.open(seq, tokens, salt)
        assert 0 <= cached < length and all(cached % group.page_size == 0 for group in GROUPS)
        self.sequences[seq] = ShadowSequence(salt, tokens, [], cached)
        for position in range(cached):
            self.sequences[seq].values.append(self.value(seq, position))
        if cached:
            self.count("hit with null pages", 0 in self.pages(seq, 2))
        self.count("hit" if cached else "miss")
        self.read_back(seq)
        extended = self.cache.extend(seq, length, reserve=True) == []
        assert extended == admissible
        if extended:
            self.sequences[seq].writable = length

    def extend(self) -> None:
        seq = self.pick()
        shadow = self.sequences[seq]
        total = self.rng.randint(len(shadow.values), len(shadow.tokens))
        before = self.state()
        copies = self.cache.extend(seq, total)
        if copies is None:
            assert self.state() == before
            self.count("lacking")
            return
        shadow.writable = total
        for copy in copies:
            assert all(copy.dst not in pages[copy.group] for other, pages in before[1].items())
            self.store(copy.group, copy.dst, self.load(copy.group, copy.src))
        self.count("copy", len(copies))
        self.read_back(seq)

    def commit(self) -> None:
        """Write positions up to a random one, as a step would, then commit them."""
        seq = self.pick()
        shadow = self.sequences[seq]
        start = len(shadow.values)
        if start >= shadow.writable:
            return
        end = self.rng.randint(start + 1, shadow.writable)
        others = [set(self.pages(other, g)) for other in self.sequences if other != seq for g in range(len(GROUPS))]
        for position in range(start, end):
            shadow.values.append(self.value(seq, position))
            for group in range(len(GROUPS)):
                place = self.place(seq, group, position)
                held_by_others = others[group :: len(GROUPS)]
                assert not any(place[1] in pages for pages in held_by_others), "a shared page is written"
                self.memory[place] = shadow.values[-1]
        self.cache.commit(seq, shadow.tokens, end)
        self.count("written", end - start)
        self.read_back(seq)

    def append(self) -> None:
        shadow = self.sequences[self.pick()]
        if len(shadow.tokens) < MAX_TOKENS:
            shadow.tokens.append(self.rng.randrange(3))

    def fork(self) -> None:
        if len(self.sequences) >= 8:
            return
        parent, child = self.pick(), self.next_id
        self.next_id += 1
        self.cache.fork(parent, child)
        source = self.sequences[parent]
        source.writable = len(source.values)
        tokens = source.tokens[: len(source.values)] + [self.rng.randrange(3) for _ in range(5)]
        self.sequences[child] = ShadowSequence(source.salt, tokens, list(source.values), source.writable)
        self.count("fork")

    def swap_out(self) -> None:
        seq = self.pick()
        shadow = self.sequences[seq]
        if not shadow.values:
            return
        swaps = self.cache.swap_out(seq, len(shadow.values))
        self.count("swap" if swaps is not None else "host full")
        if swaps is not None:
            pages = [[self.load(swap.group, page) for page in swap.pages] for swap in swaps]
            self.swapped[seq] = self.sequences.pop(seq), pages

    def swap_in(self) -> None:
        if not self.swapped or len(self.sequences) >= 8:
            return
        seq = self.rng.choice(list(self.swapped))
        shadow, saved = self.swapped[seq]
        if self.rng.random() < 0.1:
            self.cache.close(seq)
            del self.swapped[seq]
            return
        swaps = self.cache.swap_in(seq, len(shadow.tokens))
        if swaps is None:
            self.count("swap waits")
            return
        for swap, pages in zip(swaps, saved, strict=True):
            for page, values in zip(swap.pages, pages, strict=True):
                self.count("swap copies" if page else "swap finds")
                if page:
                    self.store(swap.group, page, values)
        shadow.writable = len(shadow.tokens)
        self.sequences[seq] = shadow
        del self.swapped[seq]
        self.read_back(seq)

    def load(self, group: int, page: int) -> list[int]:
        return [self.memory.get((group, page, offset), -1) for offset in range(GROUPS[group].page_size)]

    def store(self, group: int, page: int, values: list[int]) -> None:
        self.memory.update({(group, page, offset): value for offset, value in enumerate(values)})

    def close(self) -> None:
        seq = self.pick()
        self.cache.close(seq)
        del self.sequences[seq]

    def reset(self) -> None:
        """Change the weights: nothing computed before may ever be hit again."""
        self.weights += 1
        self.cache.reset_prefix_cache()
        self.count("reset")

    def value(self, seq: int, position: int) -> int:
        shadow = self.sequences[seq]
        before = shadow.values[position - 1] if position else 0
        return hash((self.weights, shadow.salt, before, shadow.tokens[position]))

    def pages(self, seq: int, group: int) -> list[int]:
        return list(self.cache.pages(seq, group))

    def place(self, seq: int, group: int, position: int) -> tuple[int, int, int]:
        size = GROUPS[group].page_size
        return group, self.cache.pages(seq, group)[position // size], position % size

    def read_back(self, seq: int) -> None:
        for group in range(len(GROUPS)):
            values, window = self.sequences[seq].values, GROUPS[group].window
            seen = max(0, len(values) - window + 1) if window else 0
            for position, value in enumerate(values[seen:], seen):
                assert self.memory[self.place(seq, group, position)] == value

    def state(self) -> tuple[list[int], dict[int, list[list[int]]]]:
        groups = range(len(GROUPS))
        free = [self.cache.free_pages(group) for group in groups]
        return free, {seq: [self.pages(seq, group) for group in groups] for seq in self.sequences}


@pytest.mark.parametrize("seed", range(4))
def test_25_000_random_operations(seed: int) -> None:
    shadow = Shadow(random.Random(seed))
    for number in range(25_000):
        shadow.step()
        shadow.cache.check_integrity()
        if number % 50 == 0:
            for seq in shadow.sequences:
                shadow.read_back(seq)
    for seq in list(shadow.sequences):
        shadow.read_back(seq)
        shadow.cache.close(seq)
    for seq in shadow.swapped:
        shadow.cache.close(seq)
    shadow.cache.check_integrity()
    assert [shadow.cache.used_pages(group) for group in range(len(GROUPS))] == [0, 0, 0]
    assert shadow.cache.swap_pages_left == SWAP_PAGES
    print(shadow.counts, shadow.cache.stats)
    for event in (
        "hit", "hit with null pages", "miss", "lacking", "copy", "fork", "reset", "written", "swap", "host full",
        "swap copies", "swap finds", "swap waits",
    ):  # fmt: skip
        assert shadow.counts.get(event, 0) >= 8, f"{event} was hardly tested"
    assert shadow.cache.stats.evictions > 1000
