"""The simulation runs the real scheduler: its counts are exact, its times are those that the cost model gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Batch, Limits, Policy, Request, Row
from lineshaft_bench.simulator.cost import Linear, Load
from lineshaft_bench.simulator.loop import Outcome, within
from lineshaft_bench.simulator.report import Summary, rows
from lineshaft_bench.simulator.setup import Contender, Setting
from lineshaft_bench.traces import Arrival, Trace, read_trace

STEP = Linear(step_s=1.0)
LIMITS = Limits(token_budget=64, max_rows=4, max_model_len=256)


def arrival(number: int, at: float, prompt: int, out: int) -> Arrival:
    return Arrival(at, ((number + 1, prompt),), out)


def run(arrivals: list[Arrival], cost: Linear = STEP, pages: int = 200, limits: Limits = LIMITS) -> Outcome:
    return Setting(limits, (pages,)).run(Trace("made", arrivals), cost)


def test_one_request_takes_a_step_for_each_token() -> None:
    found = run([arrival(0, 5.0, 10, 4)])
    assert list(found.ttft) == [1.0]
    assert list(found.itl) == [1.0, 1.0, 1.0]
    assert (list(found.queue), list(found.total), found.seconds, found.steps) == ([0.0], [4.0], 9.0, 4)


def test_a_step_that_is_scheduled_ahead_misses_what_arrives_meanwhile() -> None:
    made = Trace("made", [arrival(0, 0.0, 8, 5), arrival(1, 0.5, 8, 2)])
    alone, ahead = (Setting(LIMITS, (200,), overlap=overlap).run(made, STEP) for overlap in (False, True))
    assert list(alone.ttft) == [1.0, 1.5]
    assert list(ahead.ttft) == [1.0, 2.5]
    assert alone.output_tokens == ahead.output_tokens == 7


def test_a_long_prompt_takes_a_step_for_each_chunk() -> None:
    found = run([arrival(0, 0.0, 129, 1)])
    assert (list(found.ttft), found.steps) == ([3.0], 3)


def test_what_arrives_during_a_step_waits_for_the_next() -> None:
    found = run([arrival(0, 0.0, 8, 3), arrival(1, 0.25, 8, 1)])
    assert list(found.ttft) == [1.0, 1.75]
    assert sorted(found.queue) == [0.0, 0.75]


def test_the_clock_jumps_over_idle_time() -> None:
    found = run([arrival(0, 0.0, 8, 1), arrival(1, 1000.0, 8, 1)])
    assert (found.seconds, found.busy, found.steps) == (1001.0, 2.0, 2)


def test_no_more_rows_than_the_limit_run_at_once() -> None:
    found = run([arrival(n, 0.0, 8, 10) for n in range(9)])
    assert found.most_running == 4
    assert max(found.queue) == 20.0


def test_a_pool_that_is_too_small_preempts_and_still_finishes() -> None:
    found = run([arrival(n, 0.0, 30, 60) for n in range(4)], pages=14)
    assert found.preemptions > 0
    assert (len(found.total), found.output_tokens) == (4, 240)
    assert found.most_pages > 0.9


def test_a_request_that_can_never_fit_is_rejected_and_counted() -> None:
    found = run([arrival(0, 0.0, 300, 4), arrival(1, 0.0, 8, 4)])
    assert (found.refused, len(found.total)) == (1, 1)


def test_a_shared_prefix_is_found_again() -> None:
    prompt = ((7, 160),)
    found = run([Arrival(0.0, prompt, 2), Arrival(50.0, prompt, 2)])
    assert found.hit_tokens == 144  # whole pages, and at least one token is computed
    assert list(found.ttft) == [3.0, 1.0]


def test_a_reply_is_found_by_the_next_turn() -> None:
    found = run([Arrival(0.0, ((7, 32),), 33, reply=9), Arrival(90.0, ((7, 32), (9, 33), (8, 10)), 2)])
    assert found.hit_tokens == 64


def test_a_request_ends_at_its_deadline() -> None:
    made = [Arrival(0.0, ((n + 1, 8),), 10, deadline_s=limit) for n, limit in enumerate((4.5, 20.0))]
    found = run(made)
    assert (found.expired, len(found.total)) == (1, 1)
    assert found.output_tokens == 5 + 10


def test_the_least_work_goes_first_under_sjf() -> None:
    made = [arrival(0, 0.0, 8, 30), arrival(1, 0.5, 8, 40), arrival(2, 0.5, 8, 2)]
    one = Limits(token_budget=64, max_rows=1, max_model_len=256)
    fifo, sjf = (
        Setting(one, (200,)).run(Trace("made", made), STEP, Contender(Policy(policy))) for policy in ("fifo", "sjf")
    )
    assert list(fifo.ttft) == [1.0, 30.5, 70.5]
    assert list(sjf.ttft) == [1.0, 30.5, 32.5]


def test_priorities_go_before_the_order_of_arrival() -> None:
    made = [arrival(0, 0.0, 8, 5), Arrival(0.5, ((2, 8),), 5, priority=1), Arrival(0.6, ((3, 8),), 5, priority=0)]
    one = Limits(token_budget=64, max_rows=1, max_model_len=256)
    found = Setting(one, (200,)).run(Trace("made", made), STEP, Contender(Policy("priority")))
    assert list(found.ttft) == [1.0, pytest.approx(5.4), pytest.approx(10.5)]


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_end_where_they_end_also_where_nobody_knows_when(overlap: bool) -> None:
    made = Trace("made", [arrival(n, 0.3 * n, 8, 3 + n) for n in range(6)])
    found = Setting(LIMITS, (200,), overlap=overlap, max_tokens=100).run(made, STEP)
    assert found.output_tokens == sum(3 + n for n in range(6)) == len(found.ttft) + len(found.itl)
    assert len(found.total) == 6


def test_pages_are_swapped_or_requests_rejected_where_the_policy_says_so() -> None:
    made = Trace("made", [arrival(n, 0.0, 30, 60) for n in range(4)])
    loads: list[Load] = []

    class Noting:
        def seconds(self, load: Load) -> float:
            loads.append(load)
            return 1.0

    swapped = Setting(LIMITS, (14,)).run(made, Noting(), Contender(Policy(preemption="swap"), swap_pages=100))
    assert swapped.swaps == swapped.preemptions > 0
    assert sum(load.swapped for load in loads) > 0
    rejected = Setting(LIMITS, (14,)).run(made, STEP, Contender(Policy(preemption="reject")))
    assert rejected.rejected > 0 and rejected.rejected + len(rejected.total) == 4


def test_eviction_decides_what_is_found_again() -> None:
    """A prefix that is asked for again and again stays under lfu, whatever passes through once."""
    made = []
    for turn in range(20):
        made += [Arrival(20.0 * turn + n, ((1, 64), (100 + 3 * turn + n, 8)), 1) for n in range(3)]
        made += [arrival(1000 + 8 * turn + n, 20.0 * turn + 3 + 2 * n, 120, 1) for n in range(8)]
    hits = {
        eviction: Setting(LIMITS, (40,)).run(Trace("made", made), STEP, Contender(eviction=eviction)).hit_tokens
        for eviction in ("lru", "lfu")
    }
    assert hits == {"lru": 20 * 2 * 64, "lfu": (20 * 3 - 1) * 64}


def test_a_step_is_charged_for_what_it_computes() -> None:
    loads: list[Load] = []

    class Noting:
        def seconds(self, load: Load) -> float:
            loads.append(load)
            return 1.0

    Setting(LIMITS, (200,)).run(Trace("made", [arrival(0, 0.0, 100, 2), arrival(1, 0.0, 5, 1)]), Noting())
    assert loads == [
        Load(rows=1, tokens=64, context=64, pairs=64 * 65 / 2, logits=0, longest=64),
        Load(rows=2, tokens=41, context=105, pairs=sum(range(65, 101)) + 15, logits=2, longest=36),
        Load(rows=1, tokens=1, context=101, pairs=101, logits=1),
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=5), st.integers(1, 40))
def test_a_window_is_seen_as_if_counted_one_by_one(drawn: list[tuple[int, int]], window: int) -> None:
    request = Request(0, (1,), SamplingParams())
    batch = Batch(tuple(Row(request, start, count, False, 0, 0) for start, count in drawn))
    keys = [set(range(max(0, at + 1 - window), at + 1)) for start, count in drawn for at in range(start, start + count)]
    rows = [
        set().union(*(set(range(max(0, at + 1 - window), at + 1)) for at in range(start, start + count)))
        for start, count in drawn
    ]
    assert within(window, batch) == (sum(map(len, rows)), sum(map(len, keys)))


def test_pages_behind_a_window_are_given_back() -> None:
    limits = Limits(token_budget=16, max_rows=4, max_model_len=256)
    made = Trace("made", [arrival(n, 0.0, 100, 60) for n in range(4)])
    whole, windowed = (Setting(limits, (60,), windows=(window,)).run(made, STEP) for window in (0, 16))
    assert windowed.most_pages < 0.5 < whole.most_pages


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=25),
    st.booleans(),
)
def test_every_token_is_accounted_for(drawn: list[tuple[float, int, int]], overlap: bool) -> None:
    made = [arrival(n, at, prompt, out) for n, (at, prompt, out) in enumerate(sorted(drawn))]
    cost = Linear(0.1, row_s=0.01, token_s=0.001, context_s=1e-5)
    found = Setting(LIMITS, (30,), overlap=overlap).run(Trace("made", made), cost)
    assert found.output_tokens == sum(out for _, _, out in drawn) == len(found.ttft) + len(found.itl)
    assert len(found.total) == len(found.queue) == len(made)
    assert min(found.queue) >= 0 and found.busy <= found.seconds + 1e-6
    assert all(latency >= 0.1 for latency in [*found.ttft, *found.itl])


def test_a_simulation_is_the_same_every_time() -> None:
    trace = read_trace("chat:rate=1,requests=40")
    setting = Setting(Limits(256, 8, 8192), (2000,))
    cost = Linear(0.02, row_s=0.001)
    first, second = (setting.run(trace, cost) for _ in range(2))
    assert first == second
    assert first.hit_tokens > 0


def test_a_summary_counts_rates_over_simulated_time() -> None:
    summary = Summary.of(run([arrival(0, 0.0, 10, 4), arrival(1, 0.0, 10, 4)]))
    assert summary.output_tokens_per_s == 2.0
    assert summary.ttft.p50 == summary.itl.p99 == 1.0
    assert (summary.requests, summary.rows_per_step) == (2, 2.0)
    lines = {line[0]: line[1:] for line in rows({"a": summary, "b": summary})}
    assert lines["TTFT p50, ms"] == ("1000.00", "1000.00")
