"""CacheManager: what each operation promises, on cases small enough to count by hand."""

from __future__ import annotations

import pytest

from lineshaft.cache import CacheManager, GroupSpec, PageCopy
from lineshaft.errors import IntegrityError, InvalidValue, PoolTooSmall


def manager(*specs: tuple[int, int], **options: object) -> CacheManager:
    return CacheManager([GroupSpec(pages, size) for pages, size in specs], **options)  # type: ignore[arg-type]


def compute(cache: CacheManager, seq: int, tokens: list[int]) -> list[PageCopy] | None:
    copies = cache.extend(seq, len(tokens))
    cache.commit(seq, tokens, len(tokens))
    return copies


def run_once(cache: CacheManager, seq: int, tokens: list[int], salt: bytes = b"") -> int:
    cached = cache.open(seq, tokens, salt)
    assert compute(cache, seq, tokens) == []
    cache.close(seq)
    return cached


def test_pages_are_distinct_and_never_the_null_page() -> None:
    cache = manager((6, 4))
    cache.open(1, [0] * 20)
    assert cache.extend(1, 20) == []
    assert sorted(cache.pages(1)) == [1, 2, 3, 4, 5]
    assert (cache.used_pages(), cache.free_pages(), cache.capacity) == (5, 0, 20)
    cache.check_integrity()


def test_unused_pages_are_neither_held_nor_kept_for_their_prefix() -> None:
    cache = manager((6, 4))
    run_once(cache, 1, [0] * 9)  # two whole pages stay for their prefix, the third goes
    cache.open(2, [1])
    cache.extend(2, 1)
    (held,) = cache.pages(2)
    assert sorted([*cache.unused_pages(), held]) == [3, 4, 5]
    cache.reset_prefix_cache()
    assert sorted([*cache.unused_pages(), held]) == [1, 2, 3, 4, 5]


def test_pages_is_a_live_view() -> None:
    cache = manager((6, 4))
    cache.open(1, [0])
    pages = cache.pages(1)
    cache.extend(1, 5)
    assert len(pages) == 2


def test_lacking_pages_change_nothing_in_any_group() -> None:
    cache = manager((10, 4), (3, 4))
    cache.open(1, list(range(12)))
    assert cache.extend(1, 12) is None
    assert [cache.free_pages(group) for group in (0, 1)] == [9, 2]
    assert list(cache.pages(1, 0)) == list(cache.pages(1, 1)) == []
    assert cache.extend(1, 8) == []
    cache.check_integrity()


def test_extend_is_idempotent() -> None:
    cache = manager((10, 4))
    cache.open(1, [1] * 6)
    assert [cache.extend(1, total) for total in (6, 6, 3)] == [[], [], []]
    assert cache.used_pages() == 2


def test_reserve_keeps_the_watermark_free() -> None:
    cache = manager((11, 1), watermark=0.2)
    cache.open(1, [0] * 10)
    assert cache.extend(1, 9, reserve=True) is None
    assert cache.extend(1, 8, reserve=True) == []
    assert cache.extend(1, 10) == []


def test_prefix_hit_leaves_one_token_to_compute() -> None:
    cache = manager((10, 4))
    tokens = list(range(8))
    assert run_once(cache, 1, tokens) == 0
    assert cache.open(2, tokens) == 4
    assert cache.open(3, [*tokens, 9]) == 8
    assert cache.open(4, tokens[:4]) == 0
    assert cache.open(5, [7, *tokens]) == 0
    assert cache.pages(2)[0] == cache.pages(3)[0]
    cache.check_integrity()
    stats = cache.stats
    assert (stats.opens, stats.hits, stats.queried_tokens, stats.hit_tokens) == (5, 2, 8 + 8 + 9 + 4 + 9, 12)


def test_prefix_is_whole_pages_in_every_group() -> None:
    cache = manager((20, 4), (20, 6))
    tokens = list(range(30))
    run_once(cache, 1, tokens)
    assert cache.open(2, tokens) == 24
    assert (len(cache.pages(2, 0)), len(cache.pages(2, 1))) == (6, 4)
    assert cache.open(3, tokens[:24]) == 12
    assert cache.open(4, tokens[:12]) == 0


def test_salt_and_switch_separate_prefixes() -> None:
    cache = manager((20, 2))
    run_once(cache, 1, [1, 2, 3], b"a")
    assert cache.open(2, [1, 2, 3], b"b") == 0
    assert cache.open(3, [1, 2, 3], b"a") == 2
    off = manager((20, 2), prefix_caching=False)
    run_once(off, 1, [1, 2, 3])
    assert off.open(2, [1, 2, 3]) == 0


def test_pages_of_a_running_sequence_are_shared_at_once() -> None:
    cache = manager((20, 2))
    cache.open(1, [1, 2, 3, 4, 5])
    cache.extend(1, 5)
    assert cache.open(2, [1, 2, 3]) == 0, "not computed yet"
    cache.commit(1, [1, 2, 3, 4, 5], 4)
    assert cache.open(3, [1, 2, 3, 4, 6]) == 4
    assert list(cache.pages(3)) == list(cache.pages(1))[:2]


def test_deeper_pages_are_evicted_first() -> None:
    cache = manager((5, 1))
    run_once(cache, 1, [1, 2, 3])
    cache.open(2, [9, 9])
    assert cache.extend(2, 2) == []
    assert cache.stats.evictions == 1
    assert cache.open(3, [1, 2, 3, 4]) == 2


def test_least_recently_used_sequence_is_evicted_first() -> None:
    cache = manager((5, 1))
    for seq, tokens in enumerate(([1, 2], [3, 4], [1, 2, 5])):
        run_once(cache, seq, tokens[:2])
    cache.open(9, [7, 7])
    cache.extend(9, 2)
    assert cache.open(10, [1, 2, 0]) == 2
    assert cache.open(11, [3, 4, 0]) == 0


def test_an_idle_duplicate_gives_way_to_a_page_in_use() -> None:
    cache = manager((4, 2))
    run_once(cache, 1, [1, 2])
    cache.open(2, [1, 2])  # its only page must be computed again
    compute(cache, 2, [1, 2])
    cache.check_integrity()
    assert cache.free_pages() == 2
    assert cache.open(3, [1, 2, 3]) == 2 and cache.pages(3)[0] == cache.pages(2)[0]


def test_fork_shares_until_someone_writes() -> None:
    cache = manager((10, 4))
    tokens = [1, 2, 3, 4, 5]
    cache.open(1, tokens)
    compute(cache, 1, tokens)
    cache.fork(1, 2)
    shared, partial = cache.pages(1)
    assert cache.used_pages() == 2
    copies = cache.extend(2, 6)
    assert copies == [PageCopy(0, partial, cache.pages(2)[1])] and cache.pages(2)[0] == shared
    assert cache.extend(1, 6) == [], "the other holder is alone now"
    cache.check_integrity()


def test_fork_without_pages_to_copy_changes_nothing() -> None:
    cache = manager((3, 4))
    cache.open(1, [1] * 5)
    compute(cache, 1, [1] * 5)
    cache.fork(1, 2)
    assert cache.extend(2, 6) is None
    assert cache.pages(1) == cache.pages(2)
    cache.close(1)
    assert cache.extend(2, 6) == []


def test_forks_that_differ_register_different_prefixes() -> None:
    cache = manager((20, 2))
    cache.open(1, [1, 2, 3])
    compute(cache, 1, [1, 2, 3])
    cache.fork(1, 2)
    for seq, token in ((1, 4), (2, 5)):
        compute(cache, seq, [1, 2, 3, token])
    assert cache.open(3, [1, 2, 3, 5, 0]) == 4 and list(cache.pages(3)) == list(cache.pages(2))
    assert cache.open(4, [1, 2, 3, 4, 0]) == 4 and list(cache.pages(4)) == list(cache.pages(1))
    cache.check_integrity()


def test_reset_forgets_also_what_open_sequences_compute() -> None:
    cache = manager((20, 2))
    run_once(cache, 1, [1, 2, 3])
    cache.open(2, [5, 6, 7, 8])
    cache.extend(2, 4)
    cache.commit(2, [5, 6, 7, 8], 2)
    cache.reset_prefix_cache()
    cache.commit(2, [5, 6, 7, 8], 4)
    cache.check_integrity()
    assert cache.open(3, [1, 2, 3]) == 0 and cache.open(4, [5, 6, 7, 8, 9]) == 0
    cache.close(2)
    assert cache.free_pages() == 19


@pytest.mark.parametrize("reserve", [False, True])
def test_can_admit_foretells_open_and_extend(reserve: bool) -> None:
    for held in range(8):
        cache = manager((9, 2), (7, 3), watermark=0.3)
        run_once(cache, 1, list(range(12)))
        cache.open(2, [50] * held)
        compute(cache, 2, [50] * held)
        for tokens in ([*range(12), 7], [*range(6), 7, 8], [9] * 7, [9]):
            before = [cache.free_pages(group) for group in (0, 1)]
            foretold = cache.can_admit(tokens, cache.hashes(), reserve=reserve)
            assert before == [cache.free_pages(group) for group in (0, 1)]
            cache.open(3, tokens)
            assert (cache.extend(3, len(tokens), reserve=reserve) is not None) == foretold
            cache.close(3)


def test_hashes_may_be_kept_between_attempts() -> None:
    cache = manager((20, 2))
    hashes = cache.hashes(b"s")
    assert cache.can_admit([1, 2, 3], hashes) and cache.open(1, [1, 2, 3], hashes=hashes) == 0
    compute(cache, 1, [1, 2, 3])
    cache.close(1)
    assert cache.open(1, [1, 2, 3, 4, 5], hashes=hashes) == 2
    assert cache.open(2, [1, 2, 3], b"s") == 2 and cache.open(3, [1, 2, 3]) == 0


def test_without_groups_everything_fits() -> None:
    cache = CacheManager([])
    assert cache.open(1, [1, 2, 3]) == 0 and cache.extend(1, 10**6) == []
    cache.commit(1, [1, 2, 3], 3)
    cache.close(1)
    cache.check_integrity()


def test_senseless_pools_are_refused() -> None:
    with pytest.raises(PoolTooSmall, match="pages = 1 "):
        GroupSpec(1, 16)
    with pytest.raises(InvalidValue, match="page_size = 0"):
        GroupSpec(2, 0)
    with pytest.raises(InvalidValue, match="watermark"):
        CacheManager([GroupSpec(2, 1)], watermark=1.0)


@pytest.mark.parametrize("damage", ["lost", "null", "swap", "holder", "name", "free"])
def test_check_integrity_sees_damage(damage: str) -> None:
    cache = manager((8, 2))
    run_once(cache, 1, [7, 8])
    cache.open(2, [1, 2, 3, 4])
    compute(cache, 2, [1, 2, 3, 4])
    cache.check_integrity()
    pages, pool = cache._sequences[2].pages[0], cache._pools[0]
    if damage == "lost":
        pages.pop()
    elif damage == "null":
        pages[0] = 0
    elif damage == "swap":
        pages.reverse()
    elif damage == "holder":
        pool._holders[pages[0]] += 1
    elif damage == "name":
        pool._page_of[b"stray"] = pages[0]
    elif damage == "free":
        pool._free.append(pages[0])
    with pytest.raises(IntegrityError):
        cache.check_integrity()
