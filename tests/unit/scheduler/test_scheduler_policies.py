"""Who goes first and who makes room: admission, preemption, deadlines, tenants, stragglers, forks and swaps."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.cache import CacheManager, GroupSpec, PageSwap
from lineshaft.errors import InvalidValue
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Limits, Policy, Request, Scheduler, Status


def scheduler(
    policy: Policy | None = None, pages: int = 100, swap_pages: int = 0, prefix_caching: bool = True, **limits: object
) -> Scheduler:
    defaults: dict[str, object] = {"token_budget": 100, "max_rows": 1, "max_model_len": 64}
    cache = CacheManager([GroupSpec(pages + 1, 4)], watermark=0.0, swap_pages=swap_pages, prefix_caching=prefix_caching)
    return Scheduler(Limits(**{**defaults, **limits}), cache, policy)  # type: ignore[arg-type]


def request(number: int, length: int = 3, max_tokens: int = 1, prompt: int | None = None, **fields: Any) -> Request:
    tokens = tuple((number if prompt is None else prompt) * 1000 + i for i in range(length))
    return Request(number, tokens, SamplingParams(max_tokens=max_tokens), **fields)


def shape(batch: Batch) -> list[tuple[int, int, int]]:
    return [(row.request.id, row.start, row.count) for row in batch.rows]


def step(engine: Scheduler, now: float = 0.0) -> Batch:
    batch = engine.schedule(now)
    engine.commit(batch, [7] * batch.samples)
    return batch


def order(engine: Scheduler) -> list[int]:
    """The ids of requests in the order of their first rows."""
    found: dict[int, None] = {}
    while engine.has_work:
        found.update(dict.fromkeys(row.request.id for row in step(engine).rows))
    return list(found)


# ---- admission -------------------------------------------------------------------------------------------------------


def test_lower_priorities_first_then_deadlines_then_arrival() -> None:
    engine = scheduler(Policy("priority"))
    engine.add(request(0, priority=2, deadline=1e9, arrival=0.0))
    engine.add(request(1, priority=1, arrival=2.0))
    engine.add(request(2, priority=1, arrival=1.0))
    engine.add(request(3, priority=1, deadline=500.0, arrival=3.0))
    engine.add(request(4, priority=1, deadline=400.0, arrival=4.0))
    assert order(engine) == [4, 3, 2, 1, 0]


def test_shortest_job_first_counts_what_is_not_cached() -> None:
    engine = scheduler(Policy("sjf"))
    engine.add(request(9, 40, prompt=5))
    step(engine)
    engine.add(request(0, 20, max_tokens=9))
    engine.add(request(1, 20, max_tokens=2))
    engine.add(request(2, 40, max_tokens=2, prompt=5))
    engine.add(request(3, 6))
    assert order(engine) == [2, 3, 1, 0]


def test_expected_outputs_are_learned() -> None:
    engine = scheduler(Policy("sjf"), max_rows=8)
    long, short = request(20, 4, 30, salt=b"long"), request(21, 4, 30, salt=b"short")
    assert engine.estimator.known_output(long) is None
    for number in range(10):
        engine.add(request(number, 4, max_tokens=1 if number % 2 else 30, salt=b"short" if number % 2 else b"long"))
    while engine.has_work:
        step(engine)
    for number in range(30, 40):
        engine.add(request(number, 4, max_tokens=1 if number % 2 else 30, salt=b"short" if number % 2 else b"long"))
    while engine.has_work:
        step(engine)
    assert engine.estimator.known_output(short) == 1
    assert 24 <= (engine.estimator.known_output(long) or 0) <= 31
    scores = engine.stats.scores
    assert scores.output.count == 20 and 0 < scores.output.mean_absolute_error < 30 and scores.pages.count == 20


def test_cache_aware_admission_prefers_what_is_cached_now() -> None:
    engine = scheduler(Policy(cache_aware=True))
    engine.add(request(9, 20, prompt=5))
    step(engine)
    for number, prompt in ((0, 1), (1, 5), (2, 3)):
        engine.add(request(number, 20, prompt=prompt))
    assert order(engine) == [1, 0, 2]


POLICIES = [
    Policy("priority", aging=3), Policy("sjf", aging=3), Policy(cache_aware=True, aging=2),
    Policy("sjf", aging=5, fair_tenants=True), Policy("priority", aging=1, cache_aware=True),
]  # fmt: skip


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(POLICIES), st.booleans())
def test_nobody_is_passed_more_often_than_aging_allows(seed: int, policy: Policy, ahead: bool) -> None:
    """A flood of requests each of which goes before those that came earlier."""
    rng = random.Random(seed)
    engine = scheduler(policy, max_rows=rng.choice([1, 3]), pages=rng.choice([16, 40]))
    requests, pending = list[Request](), list[Batch]()
    passed, turns = (
        Counter[int](),
        Counter[int](),
    )  # admissions while one waits: of younger ones; of older ones and its own
    for now in range(120):
        for _ in range(rng.choice([0, 1, 1, 2])):
            salt, prompt = rng.choice([b"a", b"b"]), rng.choice([None, 7])
            length, most, number = rng.randint(1, 12), rng.randint(1, 6), len(requests)
            requests.append(request(number, length, most, prompt, priority=-number, salt=salt, arrival=float(now)))
            engine.add(requests[-1])
        waiting = [one for one in requests if one.status is Status.WAITING]
        pending.append(engine.schedule())
        admitted = [one.id for one in waiting if one.status is not Status.WAITING]
        for one in waiting:
            passed[one.id] += sum(one.id < other for other in admitted)
            turns[one.id] += sum(one.id >= other for other in admitted)
        if not ahead or len(pending) > 1 or not pending[-1].rows:
            batch = pending.pop(0)
            engine.commit(batch, [7] * batch.samples)
    assert all(passed[one.id] <= policy.aging * (1 + turns[one.id]) for one in requests)


def test_a_request_of_the_lowest_priority_ends_in_a_flood_of_higher_ones() -> None:
    engine = scheduler(Policy("priority", aging=4), pages=8, max_rows=3)
    engine.add(low := request(0, 8, max_tokens=20, priority=9))
    for number in range(1, 400):
        engine.add(request(number, 6, max_tokens=3, priority=0))
        step(engine)
        if low.finished:
            break
    assert low.finish_reason is FinishReason.LENGTH and number < 100 and engine.stats.counters.promoted > 0


def test_tenants_get_like_shares_whatever_they_ask() -> None:
    engine = scheduler(Policy(fair_tenants=True, aging=1000), max_rows=2)
    for number in range(300):
        engine.add(request(number, 10, max_tokens=4, salt=b"greedy"))
    for number in range(300, 330):
        engine.add(request(number, 10, max_tokens=4, salt=b"modest"))
    given = Counter[bytes]()
    while sum(given.values()) < 40:
        given.update(row.request.salt for row in step(engine).rows if row.start == 0)
    assert abs(given[b"greedy"] - given[b"modest"]) <= 3
    engine.add(request(400, 10, salt=b"late"))
    for _ in range(12):
        step(engine)
    assert engine.stats.waiting and all(r.salt != b"late" for r in engine._queue.requests()), "a new tenant comes soon"


@pytest.mark.parametrize("fields", [{"admission": "lifo"}, {"preemption": "none"}, {"aging": 0}, {"straggler": 0.0}])
def test_senseless_policies_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=next(iter(fields))):
        Policy(**fields)


# ---- preemption ------------------------------------------------------------------------------------------------------


def test_a_higher_priority_takes_the_place_of_the_lowest() -> None:
    engine = scheduler(Policy("priority"), max_rows=2)
    for number, priority in ((0, 5), (1, 3)):
        engine.add(request(number, max_tokens=9, priority=priority))
    step(engine)
    engine.add(request(2, priority=1, max_tokens=2))
    batch = step(engine)
    assert batch.preempted == (0,) and shape(batch) == [(1, 3, 1), (2, 0, 3)]
    engine.add(request(3, priority=3, max_tokens=2))
    assert step(engine).preempted == (), "an equal priority waits"
    assert order(engine)[-1] == 0


def test_a_higher_priority_takes_pages_only_if_they_are_enough() -> None:
    engine = scheduler(Policy("priority"), max_rows=4, pages=7)
    engine.add(request(0, 12, max_tokens=4, priority=1))
    engine.add(request(1, 7, max_tokens=4, priority=5))
    step(engine)
    engine.add(request(2, 24, max_tokens=2, priority=2))
    assert step(engine).preempted == () and step(engine).preempted == ()
    engine.add(request(3, 11, max_tokens=2, priority=2))
    engine.cancel(2)
    assert step(engine).preempted == (1,)


def test_rejected_instead_of_preempted() -> None:
    engine = scheduler(Policy(preemption="reject"), pages=3, max_rows=2)
    engine.add(request(1, 4, max_tokens=9))
    engine.add(two := request(2, 8, max_tokens=9))
    step(engine)
    batch = step(engine)
    assert batch.finished == (two,) and batch.preempted == () and two.finish_reason is FinishReason.REJECTED
    assert two.output == [7] and engine.stats.counters.rejected == 1 and engine.stats.preemptions == 0


def test_swapped_pages_come_back_and_nothing_is_computed_twice() -> None:
    engine = scheduler(Policy(preemption="swap"), pages=3, max_rows=2, swap_pages=5, prefix_caching=False)
    engine.add(request(1, 4, max_tokens=4))
    engine.add(two := request(2, 6, max_tokens=4))
    step(engine)
    held = tuple(engine.cache.pages(2))
    batch = step(engine)
    assert batch.swaps_out == (PageSwap(2, 0, held),) and batch.preempted == (2,)
    assert (two.status, two.swapped, two.computed, engine.cache.swap_pages_left) == (Status.WAITING, 6, 0, 3)
    while not (batch := step(engine)).swaps_in:
        engine.cache.check_integrity()
    assert [(swap.seq, swap.group, len(swap.pages)) for swap in batch.swaps_in] == [(2, 0, 2)]
    assert tuple(engine.cache.pages(2)) == batch.swaps_in[0].pages and shape(batch) == [(2, 6, 1)]
    assert (engine.cache.swap_pages_left, engine.stats.counters.swaps) == (5, 1)


def test_pages_that_are_still_cached_are_not_written_again() -> None:
    engine = scheduler(Policy(preemption="swap"), pages=4, max_rows=2, swap_pages=5)
    engine.add(request(1, 4, max_tokens=6))
    engine.add(request(2, 11, max_tokens=4))
    step(engine)
    first = engine.cache.pages(2)[0]
    assert step(engine).swaps_out[0].pages[0] == first
    while not (batch := step(engine)).swaps_in:
        pass
    assert batch.swaps_in[0].pages[0] == 0 and engine.cache.pages(2)[0] == first and batch.swaps_in[0].pages[2] > 0


def test_without_room_on_the_host_a_swap_recomputes_and_is_counted() -> None:
    engine = scheduler(Policy(preemption="swap"), pages=3, max_rows=2, swap_pages=1)
    engine.add(request(1, 4, max_tokens=4))
    engine.add(two := request(2, 6, max_tokens=4))
    step(engine)
    batch = step(engine)
    assert batch.preempted == (2,) and batch.swaps_out == () and two.swapped == 0
    assert (engine.stats.counters.swap_fallbacks, engine.stats.counters.swaps) == (1, 0)


def test_cancelling_a_swapped_request_frees_the_host() -> None:
    engine = scheduler(Policy(preemption="swap"), pages=3, max_rows=2, swap_pages=5)
    engine.add(request(1, 4, max_tokens=4))
    engine.add(request(2, 6, max_tokens=4))
    step(engine)
    step(engine)
    assert engine.cache.swap_pages_left == 3
    engine.cancel(2)
    assert engine.cache.swap_pages_left == 5
    engine.cache.check_integrity()


def test_stragglers_lose_their_pages_first() -> None:
    engine = scheduler(Policy(straggler=2.0), max_rows=4)
    for number in range(10):
        engine.add(request(number, max_tokens=2))
    while engine.has_work:
        step(engine)
    engine.add(one := request(20, max_tokens=30))
    step(engine)
    engine.add(request(21, max_tokens=30))
    for _ in range(3):
        step(engine)
    assert [r.id for r in engine.running] == [21, 20] and one.straggling and engine.stats.counters.stragglers == 1


# ---- deadlines and prefill beside decodes ----------------------------------------------------------------------------


def test_deadlines_end_requests_wherever_they_are() -> None:
    engine = scheduler()
    requests = [request(number, max_tokens=9, deadline=deadline) for number, deadline in enumerate((5.0, 3.0, None))]
    for one in requests:
        engine.add(one)
    assert shape(step(engine, 1.0)) == [(0, 0, 3)]
    batch = step(engine, 3.0)
    assert batch.finished == (requests[1],) and shape(batch) == [(0, 3, 1)]
    batch = engine.schedule(5.0)
    assert batch.finished == (requests[0],) and shape(batch) == [(2, 0, 3)]
    assert requests[0].finish_reason is FinishReason.DEADLINE and requests[0].output == [7, 7]
    assert engine.stats.counters.expired == 2


def test_a_deadline_passes_while_a_row_is_in_flight() -> None:
    engine = scheduler()
    engine.add(one := request(0, max_tokens=9, deadline=5.0))
    first = engine.schedule(1.0)
    second = engine.schedule(5.0)
    assert (second.finished, second.rows) == ((one,), ())
    assert engine.commit(first, [7]) == [] and one.output == [] and not engine.has_work


def test_a_long_prefill_does_not_hold_up_decodes() -> None:
    engine = scheduler(max_rows=2, max_prefill_tokens=5)
    engine.add(request(0, max_tokens=9))
    step(engine)
    engine.add(request(1, 12))
    assert [shape(step(engine))[1:] for _ in range(3)] == [[(1, 0, 5)], [(1, 5, 5)], [(1, 10, 2)]]
    engine.cancel(0)
    engine.add(request(2, 12))
    assert shape(step(engine)) == [(2, 0, 12)], "alone it has the whole budget"


# ---- forks -----------------------------------------------------------------------------------------------------------


def family(count: int, length: int, max_tokens: int) -> list[Request]:
    parent = request(0, length, max_tokens)
    children = [request(i, length, max_tokens, prompt=0, parent=parent, fork=i) for i in range(1, count)]
    return [parent, *children]


@pytest.mark.parametrize("length", [8, 9, 10])
def test_forks_wait_for_the_prompt_and_share_its_pages(length: int) -> None:
    engine = scheduler(max_rows=4, max_query=6, prefix_caching=False)
    requests = family(3, length, 6)
    for one in requests:
        engine.add(one)
    assert [shape(step(engine)) for _ in range(2)] == [[(0, 0, 6)], [(0, 6, length - 6)]]
    batch = step(engine)
    assert shape(batch) == [(0, length, 1), (1, length - 1, 1), (2, length - 1, 1)]
    partial = (length - 1) % 4 > 0
    assert len(batch.copies) == 2 * partial and all(copy.src in engine.cache.pages(0) for copy in batch.copies)
    shared = (length - 1) // 4
    pages = [list(engine.cache.pages(number)) for number in range(3)]
    assert pages[0][:shared] == pages[1][:shared] == pages[2][:shared]
    assert len({page for own in pages for page in own[shared:]}) == sum(len(own) - shared for own in pages)
    assert [one.cached for one in requests] == [0, length - 1, length - 1]


def test_forks_of_a_parent_that_ended_use_the_prefix_cache() -> None:
    engine = scheduler(max_rows=4)
    for one in family(2, 10, 1):
        engine.add(one)
    assert [shape(step(engine)) for _ in range(2)] == [[(0, 0, 10)], [(1, 8, 2)]]


@pytest.mark.parametrize("computed", [False, True])
def test_forks_outlive_a_parent_that_is_cancelled(computed: bool) -> None:
    engine = scheduler(max_rows=4)
    requests = family(3, 10, 3)
    for one in requests:
        engine.add(one)
    if computed:
        step(engine)
    engine.cancel(0)
    engine.cancel(2)
    assert order(engine) == [1] and requests[1].output == [7, 7, 7] and engine.cache.used_pages() == 0
