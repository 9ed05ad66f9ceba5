"""The scheduler on small cases: what a step holds, in what order, and how requests end."""

from __future__ import annotations

import pytest

from lineshaft.cache import CacheManager, GroupSpec, PageCopy
from lineshaft.errors import ContractViolation, EmptyPrompt, InvalidValue, PromptTooLong
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Limits, Request, Scheduler, Status


def scheduler(pages: int = 100, page_size: int = 4, watermark: float = 0.0, **limits: object) -> Scheduler:
    defaults: dict[str, object] = {"token_budget": 100, "max_rows": 8, "max_model_len": 64}
    cache = CacheManager([GroupSpec(pages + 1, page_size)], watermark=watermark)
    return Scheduler(Limits(**{**defaults, **limits}), cache)  # type: ignore[arg-type]


def request(number: int, length: int, max_tokens: int = 5, eos: int | None = None, **params: object) -> Request:
    eos_ids = frozenset() if eos is None else frozenset((eos,))
    prompt = tuple(number * 1000 + i for i in range(length))
    return Request(number, prompt, SamplingParams(max_tokens=max_tokens, **params), eos_ids)  # type: ignore[arg-type]


def shape(batch: Batch) -> list[tuple[int, int, int]]:
    return [(row.request.id, row.start, row.count) for row in batch.rows]


def step(engine: Scheduler, token: int = 7) -> list[tuple[int, int, int]]:
    batch = engine.schedule()
    engine.commit(batch, [token for row in batch.rows if row.samples])
    return shape(batch)


def test_prefill_then_decode_then_length() -> None:
    engine = scheduler()
    engine.add(one := request(1, 3, max_tokens=3))
    assert [step(engine) for _ in range(3)] == [[(1, 0, 3)], [(1, 3, 1)], [(1, 4, 1)]]
    assert (one.status, one.finish_reason, one.stop_reason) == (Status.FINISHED, FinishReason.LENGTH, None)
    assert one.output == [7, 7, 7] and not engine.has_work and engine.cache.used_pages() == 0
    assert engine.schedule().rows == ()


def test_decode_rows_come_first_then_chunks_then_new_requests() -> None:
    engine = scheduler(token_budget=10)
    engine.add(request(1, 4))
    engine.add(request(2, 20))
    engine.add(request(3, 2))
    assert step(engine) == [(1, 0, 4), (2, 0, 6)]
    assert step(engine) == [(1, 4, 1), (2, 6, 9)]
    assert step(engine) == [(1, 5, 1), (2, 15, 5), (3, 0, 2)]
    assert step(engine) == [(1, 6, 1), (2, 20, 1), (3, 2, 1)]


def test_only_the_last_chunk_samples_and_keeps_saying_so() -> None:
    engine = scheduler(max_query=4)
    engine.add(request(1, 6))
    first, second = engine.schedule(), None
    assert not first.rows[0].samples and engine.commit(first, []) == []
    second = engine.schedule()
    assert second.rows[0].samples and second.tokens == 2
    engine.commit(second, [1])
    assert second.rows[0].samples and not first.rows[0].samples


def test_row_limits() -> None:
    engine = scheduler(max_rows=2, max_prefill_rows=1)
    for number in (1, 2, 3):
        engine.add(request(number, 2))
    assert step(engine) == [(1, 0, 2)]
    assert step(engine) == [(1, 2, 1), (2, 0, 2)]
    assert step(engine) == [(1, 3, 1), (2, 2, 1)]
    assert (engine.stats.running, engine.stats.waiting) == (2, 1)


def test_without_mixed_steps_prefill_and_decode_take_turns() -> None:
    engine = scheduler(mixed_steps=False, max_prefill_rows=1)
    engine.add(request(1, 2))
    engine.add(request(2, 2))
    engine.add(request(3, 2))
    assert [step(engine) for _ in range(6)] == [
        [(1, 0, 2)],
        [(1, 2, 1)],
        [(2, 0, 2)],
        [(1, 3, 1), (2, 2, 1)],
        [(3, 0, 2)],
        [(1, 4, 1), (2, 3, 1), (3, 2, 1)],
    ]
    assert step(engine) == [(1, 5, 1), (2, 4, 1), (3, 3, 1)], "nothing to prefill: decode again"


@pytest.mark.parametrize("mixed", [True, False])
def test_a_stream_of_short_requests_starves_nobody(mixed: bool) -> None:
    engine = scheduler(pages=8, token_budget=6, max_rows=3, mixed_steps=mixed)
    engine.add(long := request(1, 20, max_tokens=8))
    for number in range(2, 80):
        engine.add(request(number, 3, max_tokens=2))
        step(engine)
    assert long.finished and len(long.output) == 8


def test_prefix_hits_are_taken_and_noted() -> None:
    engine = scheduler()
    first = request(1, 10, max_tokens=1)
    engine.add(first)
    step(engine)
    second = Request(2, (*first.prompt, 5, 6), first.params)
    other_salt = Request(3, first.prompt, first.params, salt=b"other")
    engine.add(second)
    engine.add(other_salt)
    assert step(engine) == [(2, 8, 4), (3, 0, 10)]
    assert (second.cached, other_salt.cached) == (8, 0)


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    engine = scheduler(pages=4, max_rows=3)
    for number in (1, 2, 3):
        engine.add(request(number, 4, max_tokens=8))
    assert step(engine) == [(1, 0, 4), (2, 0, 4), (3, 0, 4)]
    batch = engine.schedule()  # each needs a second page, one is left
    assert batch.preempted == (3,) and shape(batch) == [(1, 4, 1), (2, 4, 1)]
    engine.add(request(4, 1))
    engine.commit(batch, [7, 7])
    assert engine.schedule().rows[2:] == (), "3 waits for pages, and 4 waits behind it"


def test_a_preempting_step_admits_nobody() -> None:
    engine = scheduler(pages=3)
    engine.add(request(1, 4, max_tokens=9))
    engine.add(request(2, 8, max_tokens=9))
    step(engine)
    batch = engine.schedule()
    assert batch.preempted == (2,) and shape(batch) == [(1, 4, 1)]


def test_cached_tells_of_the_first_admission_and_computed_starts_again() -> None:
    engine = scheduler(pages=4)
    engine.add(request(1, 4, max_tokens=6))
    engine.add(two := request(2, 8, max_tokens=6))
    step(engine)
    batch = engine.schedule()
    assert batch.preempted == (2,) and (two.status, two.computed, two.preemptions) == (Status.WAITING, 0, 1)
    engine.commit(batch, [7])
    again = [row for _ in range(8) for row in step(engine) if row[0] == 2]
    assert again[0] == (2, 4, 5) and two.cached == 0, "one of its own pages was still in the prefix cache"


def test_no_more_run_than_can_decode_in_one_step() -> None:
    engine = scheduler(token_budget=2, mixed_steps=False)
    for number in (1, 2, 3):
        engine.add(request(number, 1, max_tokens=3))
    assert [step(engine) for _ in range(3)] == [[(1, 0, 1), (2, 0, 1)], [(1, 1, 1), (2, 1, 1)], [(1, 2, 1), (2, 2, 1)]]
    assert step(engine) == [(3, 0, 1)]


def test_copies_of_forked_pages_are_in_the_batch() -> None:
    engine = scheduler()
    engine.add(request(1, 5))
    step(engine)
    engine.cache.fork(1, 99)
    old = engine.cache.pages(1)[1]
    batch = engine.schedule()
    assert batch.copies == (PageCopy(0, old, engine.cache.pages(1)[1]),)


def test_watermark_holds_back_admission_but_not_a_lone_request() -> None:
    engine = scheduler(pages=10, watermark=0.3)
    engine.add(request(1, 20))
    engine.add(request(2, 12))
    assert step(engine) == [(1, 0, 20)]
    lone = scheduler(pages=10, watermark=0.9)
    lone.add(request(1, 40, max_tokens=1))
    assert step(lone) == [(1, 0, 40)]


def test_a_lone_request_uses_the_whole_pool_and_no_more() -> None:
    engine = scheduler(pages=3)
    engine.add(one := request(1, 9, max_tokens=50))
    for _ in range(4):
        step(engine)
    assert one.finish_reason is FinishReason.LENGTH and one.preemptions == 0
    assert one.computed == 12 and len(one.tokens) == 13


def test_the_context_ends_a_request() -> None:
    engine = scheduler(max_model_len=10)
    engine.add(one := request(1, 9, max_tokens=50))
    assert step(engine) == [(1, 0, 9)] and one.finish_reason is FinishReason.LENGTH and len(one.tokens) == 10


@pytest.mark.parametrize(
    ("params", "reason", "stop_reason"),
    [
        ({}, FinishReason.STOP, 7),
        ({"ignore_eos": True}, FinishReason.LENGTH, None),
        ({"ignore_eos": True, "stop_token_ids": [7]}, FinishReason.STOP, 7),
    ],
)
def test_how_a_request_ends(params: dict[str, object], reason: FinishReason, stop_reason: int | None) -> None:
    engine = scheduler()
    engine.add(one := request(1, 3, max_tokens=2, eos=7, **params))
    for _ in range(2):
        step(engine)
    assert (one.finish_reason, one.stop_reason, one.output[0]) == (reason, stop_reason, 7)


def test_the_engine_may_finish_a_request_itself() -> None:
    engine = scheduler()
    engine.add(one := request(1, 3))
    step(engine)
    engine.finish(one, FinishReason.STOP, "###")
    engine.finish(one, FinishReason.LENGTH)
    assert (one.finish_reason, one.stop_reason) == (FinishReason.STOP, "###")
    assert not engine.has_work and engine.cache.used_pages() == 0


def test_cancel_waiting_running_and_during_a_step() -> None:
    engine = scheduler(max_rows=2)
    requests = [request(number, 3) for number in (1, 2, 3)]
    for one in requests:
        engine.add(one)
    batch = engine.schedule()
    assert engine.cancel(3) is requests[2] and engine.cancel(1) is requests[0]
    assert engine.cancel(1) is None and engine.cancel(99) is None
    assert engine.commit(batch, [5, 6]) == []
    assert [one.output for one in requests] == [[], [6], []]
    assert requests[0].finish_reason is FinishReason.CANCELLED
    assert step(engine) == [(2, 3, 1)]


def test_a_failed_row_is_finished_by_the_engine_or_refused() -> None:
    engine = scheduler()
    engine.add(one := request(1, 3))
    batch = engine.schedule()
    with pytest.raises(ContractViolation, match="token -1"):
        engine.commit(batch, [-1])
    with pytest.raises(ContractViolation, match="1 sampling rows gave 2"):
        engine.commit(batch, [1, 2])
    assert one.computed == 0 and one.output == []
    engine.finish(one, FinishReason.ERROR)
    assert engine.commit(batch, [-1]) == []


def test_prompts_that_cannot_be_served_are_refused() -> None:
    engine = scheduler(pages=4, max_model_len=12)
    with pytest.raises(EmptyPrompt):
        engine.add(request(1, 0))
    with pytest.raises(PromptTooLong, match=r"12 tokens.*at most 11"):
        engine.add(request(1, 12))
    small = scheduler(pages=2)
    with pytest.raises(PromptTooLong, match=r"9 tokens.*holds 8"):
        small.add(request(1, 9))
    engine.add(request(1, 11))
    small.add(request(1, 8))
    assert step(engine) == [(1, 0, 11)] and step(small) == [(1, 0, 8)]


@pytest.mark.parametrize("name", ["token_budget", "max_rows", "max_model_len", "max_prefill_rows", "max_query"])
def test_senseless_limits_are_refused(name: str) -> None:
    with pytest.raises(InvalidValue, match=f"{name} = 0"):
        scheduler(**{name: 0})


def test_tokens_is_prompt_and_output() -> None:
    one = Request(1, (1, 2), SamplingParams(), output=[3])
    assert list(one.tokens) == [1, 2, 3] and one.remaining == 3
    one.output.extend((4, 5))
    assert list(one.tokens) == [1, 2, 3, 4, 5] and one.tokens is one.tokens
