"""Steps that are scheduled while the one before them is not committed, and rows that want logits of a prompt."""

from __future__ import annotations

import pytest

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Limits, Request, Scheduler, Status


def scheduler(pages: int = 100, **limits: object) -> Scheduler:
    defaults: dict[str, object] = {"token_budget": 100, "max_rows": 8, "max_model_len": 64}
    return Scheduler(Limits(**{**defaults, **limits}), CacheManager([GroupSpec(pages + 1, 4)], watermark=0.0))  # type: ignore[arg-type]


def request(number: int, length: int, max_tokens: int = 5, **params: object) -> Request:
    prompt = tuple(number * 1000 + i for i in range(length))
    return Request(number, prompt, SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]


def scored(number: int, length: int) -> Request:
    return Request(number, tuple(range(length)), SamplingParams(max_tokens=5, prompt_logprobs=1))


def shape(batch: Batch) -> list[tuple[int, int, int]]:
    return [(row.request.id, row.start, row.count) for row in batch.rows]


def test_the_next_step_starts_at_the_token_in_flight() -> None:
    engine = scheduler()
    engine.add(one := request(1, 3))
    first = engine.schedule()
    assert (one.scheduled, one.computed, one.in_flight, one.remaining) == (3, 0, 1, 1)
    second = engine.schedule()
    assert shape(second) == [(1, 3, 1)] and (one.scheduled, one.in_flight) == (4, 2)
    engine.commit(first, [7])
    assert (one.computed, one.in_flight, one.output, one.tokens[3]) == (3, 1, [7], 7)
    engine.commit(second, [8])
    assert (one.computed, one.in_flight, one.output) == (4, 0, [7, 8])


def test_what_is_certain_to_end_is_not_scheduled_again() -> None:
    engine = scheduler()
    engine.add(one := request(1, 3, max_tokens=2))
    batches = [engine.schedule(), engine.schedule()]
    engine.commit(batches[0], [7])
    assert engine.has_work and engine.schedule().rows == ()
    assert engine.commit(batches[1], [7]) == [one] and one.output == [7, 7]
    assert not engine.has_work and engine.cache.used_pages() == 0


def test_a_stop_token_wastes_the_row_in_flight_and_its_pages_are_free_at_once() -> None:
    engine = scheduler()
    engine.add(one := request(1, 3, stop_token_ids=[9]))
    first, second = engine.schedule(), engine.schedule()
    assert engine.commit(first, [9]) == [one] and engine.cache.used_pages() == 0
    assert engine.commit(second, [5]) == [] and one.output == [9] and one.finish_reason is FinishReason.STOP
    engine.cache.check_integrity()


def test_a_token_comes_back_for_a_request_that_was_preempted_meanwhile() -> None:
    engine = scheduler(pages=3)
    engine.add(request(1, 4, max_tokens=9))
    engine.add(two := request(2, 4, max_tokens=9))
    first = engine.schedule()
    second = engine.schedule()
    assert second.preempted == (2,) and shape(second) == [(1, 4, 1)]
    engine.commit(first, [7, 8])
    assert (two.output, two.in_flight, two.computed, two.status) == ([8], 0, 0, Status.WAITING)
    engine.commit(second, [7])
    engine.cache.check_integrity()
    while not two.finished:
        batch = engine.schedule()
        engine.commit(batch, [6] * batch.samples)
    assert two.output == [8, *[6] * 8]


def test_cancelled_while_two_of_its_rows_are_in_flight() -> None:
    engine = scheduler()
    engine.add(one := request(1, 3))
    engine.add(request(2, 3))
    first, second = engine.schedule(), engine.schedule()
    engine.cancel(1)
    engine.commit(first, [7, 7])
    third = engine.schedule()
    assert shape(third) == [(2, 4, 1)]
    engine.commit(second, [-1, 7])
    engine.commit(third, [7])
    assert one.output == [] and engine.cache.used_pages() == 2


def test_growth_waits_for_pages_that_a_commit_is_certain_to_free() -> None:
    engine = scheduler(pages=3)
    engine.add(request(1, 4, max_tokens=1))
    engine.add(two := request(2, 8, max_tokens=5))
    first = engine.schedule()
    assert (shape(first), engine.schedule().rows) == ([(1, 0, 4), (2, 0, 8)], ())
    engine.commit(first, [7, 7])
    assert shape(engine.schedule()) == [(2, 8, 1)] and two.preemptions == 0


def test_at_most_one_earlier_batch_is_uncommitted_and_order_is_kept() -> None:
    engine = scheduler()
    engine.add(request(1, 3))
    first, second = engine.schedule(), engine.schedule()
    with pytest.raises(AssertionError, match="two batches"):
        engine.schedule()
    with pytest.raises(AssertionError, match="order"):
        engine.commit(second, [7])
    engine.commit(first, [7])
    engine.commit(second, [7])


def test_discarded_batches_leave_every_request_to_be_computed_again() -> None:
    engine = scheduler()
    engine.add(one := request(1, 5))
    engine.add(two := request(2, 5))
    engine.commit(engine.schedule(), [7, 7])
    engine.schedule(), engine.schedule()
    engine.discard()
    assert (one.in_flight, one.length, one.output, one.preemptions) == (0, 6, [7], 0)
    engine.cache.check_integrity()
    batch = engine.schedule()
    assert shape(batch) == [(1, 4, 2), (2, 4, 2)], "what was committed is in the prefix cache"
    assert engine.commit(batch, [8, 8]) == [] and two.output == [7, 8] and two.cached == 0


def test_a_scored_prompt_takes_a_row_of_logits_a_token() -> None:
    engine = scheduler(max_rows=4)
    engine.add(request(1, 3))
    engine.add(one := scored(2, 9))
    found = []
    for _ in range(4):
        batch = engine.schedule()
        assert batch.logits <= 4
        found.append([(row.start, row.count, row.logits) for row in batch.rows if row.request is one])
        engine.commit(batch, [7] * batch.samples)
    assert found == [[(0, 3, 3)], [(3, 3, 3)], [(6, 3, 3)], [(9, 1, 1)]]


def test_a_row_that_finds_no_row_of_logits_left_samples_later() -> None:
    engine = scheduler(max_rows=4)
    engine.add(scored(1, 4))
    engine.add(request(2, 3))
    first = engine.schedule()
    assert [(row.count, row.samples, row.logits) for row in first.rows] == [(4, True, 4), (2, False, 0)]
    engine.commit(first, [7])
    assert shape(engine.schedule()) == [(1, 4, 1), (2, 2, 1)]


def test_a_scored_prompt_does_not_read_the_prefix_cache_but_fills_it() -> None:
    engine = scheduler(max_rows=16)
    for number in (1, 2):
        engine.add(one := scored(number, 9))
        batch = engine.schedule()
        assert (shape(batch), one.cached) == ([(number, 0, 9)], 0)
        engine.commit(batch, [7])
        engine.cancel(number)
    engine.add(Request(3, tuple(range(9)), SamplingParams()))
    assert shape(engine.schedule()) == [(3, 8, 1)]


def like(number: int, other: Request, tail: int) -> Request:
    """A request that begins as another does, and goes on differently after `tail` tokens less."""
    return Request(number, (*other.prompt[: len(other.prompt) - tail], *range(tail)), SamplingParams(max_tokens=5))


def test_requests_of_one_step_share_the_prefix_that_the_first_of_them_computes() -> None:
    engine = scheduler()
    engine.add(one := request(1, 14))
    engine.add(two := like(2, one, 3))
    first = engine.schedule()
    assert shape(first) == [(1, 0, 14), (2, 8, 6)], "two whole pages of four tokens are shared"
    engine.add(like(3, one, 1))
    second = engine.schedule()
    assert shape(second)[2:] == [(3, 12, 2)], "and by those of a step that is scheduled before it is committed"
    engine.commit(first, [7, 7])
    engine.commit(second, [8, 8, 8])
    engine.cache.check_integrity()
    assert (two.cached, engine.cache.stats.hit_tokens) == (8, 20)


def test_of_a_chunked_prompt_the_computed_part_is_shared() -> None:
    engine = scheduler(token_budget=9)
    engine.add(one := request(1, 14))
    assert shape(engine.schedule()) == [(1, 0, 9)]
    engine.add(like(2, one, 1))
    assert shape(engine.schedule()) == [(1, 9, 5), (2, 12, 2)]


def test_pages_of_a_step_that_never_ran_are_not_shared_afterwards() -> None:
    engine = scheduler()
    engine.add(one := request(1, 14))
    engine.add(two := like(2, one, 3))
    engine.commit(engine.schedule(), [7, 7])
    engine.add(three := request(3, 14))
    engine.schedule()
    engine.cancel(3)
    engine.discard()
    engine.cache.check_integrity()
    engine.add(like(4, three, 1))
    assert shape(engine.schedule()) == [(1, 12, 3), (2, 12, 3), (4, 0, 14)], "what was committed still is"
    assert two.output == [7]
