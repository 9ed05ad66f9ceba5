"""Groups with a window, eviction policies and pages on the host: what the manager promises, on countable cases."""

from __future__ import annotations

import sys

import pytest

from lineshaft.cache import CacheManager, GroupSpec, PageSwap, pages_in_window
from lineshaft.errors import InvalidValue


def grown(cache: CacheManager, seq: int, tokens: list[int], step: int = 4) -> None:
    """Compute the tokens in steps, one of them always in flight."""
    at = cache.open(seq, tokens)
    while at < len(tokens):
        end = min(len(tokens), at + step)
        assert cache.extend(seq, len(tokens), start=at) == []
        cache.commit(seq, tokens, at)
        cache.check_integrity()
        at = end
    cache.commit(seq, tokens, at)


def test_pages_out_of_the_window_are_given_up_and_others_kept() -> None:
    cache = CacheManager([GroupSpec(20, 4), GroupSpec(10, 4, window=6)], chunk=4)
    grown(cache, 1, list(range(40)))
    assert len(cache.pages(1, 0)) == 10 and 0 not in cache.pages(1, 0)
    pages = list(cache.pages(1, 1))
    assert pages[:8] == [0] * 8 and all(pages[8:]), "the next query, at 40, sees positions from 35 on"
    assert (cache.used_pages(0), cache.used_pages(1)) == (10, 2)
    assert cache.pages_held(1) == 12
    cache.close(1)
    assert cache.used_pages(1) == 0
    cache.check_integrity()


@pytest.mark.parametrize(("window", "size", "chunk"), [(1, 1, 1), (6, 4, 4), (7, 2, 5), (16, 16, 3), (3, 8, 20)])
def test_a_sequence_of_any_length_fits_in_the_pages_of_its_window(window: int, size: int, chunk: int) -> None:
    need = pages_in_window(window, size, chunk)
    cache = CacheManager([GroupSpec(need + 1, size, window)], chunk=chunk, prefix_caching=False, watermark=0.0)
    assert cache.capacity == sys.maxsize
    tokens = list(range(10 * (window + chunk + size)))
    cache.open(1, tokens)
    for at in range(0, len(tokens), chunk):
        cache.commit(1, tokens, max(0, at - chunk))  # the step before is in flight
        assert cache.extend(1, len(tokens), start=at) == []
        assert cache.pages_held(1) <= need
    tight = CacheManager([GroupSpec(need, size, window)], chunk=chunk)
    assert tight.capacity == (need - 1) * size


def test_a_prefix_hit_asks_for_what_the_window_still_sees() -> None:
    cache = CacheManager([GroupSpec(40, 4), GroupSpec(12, 4, window=6)], chunk=4)
    tokens = list(range(24))
    grown(cache, 1, tokens)
    cache.close(1)
    assert cache.open(2, [*tokens, 7]) == 24
    assert list(cache.pages(2, 1))[:4] == [0] * 4 and all(list(cache.pages(2, 1))[4:])
    assert cache.open(3, [*tokens[:13], 50, 51]) == 12
    cache.check_integrity()
    cache.close(2), cache.close(3)
    grown(cache, 4, list(range(100, 140)), step=4)  # takes all pages of the second group
    assert cache.open(5, [*tokens, 7]) in (0, 4), "the first group has all, the second what was not evicted"


def test_a_fork_needs_pages_that_its_parent_still_has() -> None:
    cache = CacheManager([GroupSpec(20, 4, window=5)], chunk=4)
    tokens = list(range(30))
    grown(cache, 1, tokens)
    assert cache.can_fork(1, 29) and not cache.can_fork(1, 12)
    cache.fork(1, 2, 29)
    assert cache.extend(2, 30) is not None
    cache.check_integrity()
    assert cache.pages(2)[0] == 0 and cache.pages(1)[7] != cache.pages(2)[7] and cache.pages(1)[6] == cache.pages(2)[6]


@pytest.mark.parametrize(
    ("eviction", "left"),
    [("lru", [0, 2, 2]), ("fifo", [0, 2, 2]), ("lfu", [2, 0, 2])],
)
def test_eviction_policies(eviction: str, left: list[int]) -> None:
    """Three prefixes of two pages: the first is shared twice more, then the second is used once more, last."""
    cache = CacheManager([GroupSpec(7, 1)], eviction=eviction, watermark=0.0)
    prefixes = [[1, 2], [3, 4], [5, 6]]

    def use(seq: int, tokens: list[int]) -> None:
        cache.open(seq, tokens)
        cache.extend(seq, len(tokens))
        cache.commit(seq, tokens, len(tokens))
        cache.close(seq)

    for seq, tokens in enumerate(prefixes):
        use(seq, tokens)
    for seq in (10, 11):
        cache.open(seq, [*prefixes[0], 9])
    cache.close(10), cache.close(11)
    cache.open(12, [*prefixes[1], 9])
    cache.close(12)
    cache.open(13, [*prefixes[2], 9])
    cache.close(13)
    cache.open(20, [8, 8])
    assert cache.extend(20, 2) == [] and cache.stats.evictions == 2
    assert [cache.cached([*tokens, 9], cache.hashes()) for tokens in prefixes] == left
    cache.check_integrity()


def test_hit_rates_are_counted() -> None:
    cache = CacheManager([GroupSpec(30, 4)])
    grown(cache, 1, list(range(12)))
    cache.open(2, [*range(12), 5])
    cache.open(3, [*range(5), 50, 51, 52, 53])
    stats = cache.stats
    assert (stats.opens, stats.hits, stats.partial_hits) == (3, 2, 1)
    assert (stats.queried_tokens, stats.hit_tokens, stats.hit_rate) == (34, 16, 16 / 34)


def test_what_is_swapped_out_comes_back_on_other_pages() -> None:
    cache = CacheManager([GroupSpec(9, 4), GroupSpec(9, 4, window=5)], chunk=4, swap_pages=7, prefix_caching=False)
    tokens = list(range(16))
    grown(cache, 1, tokens)
    before = [list(cache.pages(1, group)) for group in (0, 1)]
    out = cache.swap_out(1, 14)
    assert out == [PageSwap(1, 0, tuple(before[0])), PageSwap(1, 1, (before[1][3],))] and cache.swap_pages_left == 2
    assert (cache.used_pages(0), cache.used_pages(1)) == (0, 0)
    cache.check_integrity()
    grown(cache, 2, list(range(50, 58)))
    assert cache.swap_out(2, 8) is None and cache.used_pages(0) == 2, "no room on the host"
    back = cache.swap_in(1, 18)
    assert back is not None and [len(swap.pages) for swap in back] == [4, 1] and cache.swap_pages_left == 7
    assert list(cache.pages(1, 1))[:3] == [0, 0, 0] and cache.pages(1, 1)[3] == back[1].pages[0]
    assert len(cache.pages(1, 0)) == len(cache.pages(1, 1)) == 5
    cache.check_integrity()
    cache.commit(1, [*tokens, 1, 1], 18)


def test_swapping_in_without_pages_changes_nothing() -> None:
    cache = CacheManager([GroupSpec(5, 4)], swap_pages=4, watermark=0.0)
    grown(cache, 1, list(range(16)))
    assert cache.swap_out(1, 16) is not None
    grown(cache, 2, list(range(50, 58)))
    assert cache.swap_in(1, 17) is None and cache.used_pages() == 2 and cache.swap_pages_left == 0
    cache.check_integrity()
    cache.close(1)
    assert cache.swap_pages_left == 4


def test_senseless_groups_are_refused() -> None:
    with pytest.raises(InvalidValue, match="window = -1"):
        GroupSpec(4, 4, -1)
    with pytest.raises(InvalidValue, match=r"eviction = 'mru'.*lru, fifo, lfu"):
        CacheManager([GroupSpec(4, 4)], eviction="mru")
