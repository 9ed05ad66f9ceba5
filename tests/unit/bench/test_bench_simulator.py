"""The simulation runs the real scheduler: its counts are exact, its times are those that the cost model gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.errors import InvalidValue
from lineshaft.scheduler import Limits
from lineshaft_bench.simulator.cost import Linear, Load
from lineshaft_bench.simulator.loop import Outcome
from lineshaft_bench.simulator.report import Summary, rows
from lineshaft_bench.simulator.setup import Setting
from lineshaft_bench.traces import Arrival, Trace, read_trace

STEP = Linear(step_s=1.0)
LIMITS = Limits(token_budget=64, max_rows=4, max_model_len=256)


def arrival(number: int, at: float, prompt: int, out: int) -> Arrival:
    return Arrival(at, ((number + 1, prompt),), out)


def run(arrivals: list[Arrival], cost: Linear = STEP, pages: int = 200, limits: Limits = LIMITS) -> Outcome:
    return Setting(limits, pages).run(Trace("made", arrivals), cost, "fifo")


def test_one_request_takes_a_step_for_each_token() -> None:
    found = run([arrival(0, 5.0, 10, 4)])
    assert list(found.ttft) == [1.0]
    assert list(found.itl) == [1.0, 1.0, 1.0]
    assert (list(found.queue), list(found.total), found.seconds, found.steps) == ([0.0], [4.0], 9.0, 4)


def test_a_step_that_is_scheduled_ahead_misses_what_arrives_meanwhile() -> None:
    made = Trace("made", [arrival(0, 0.0, 8, 5), arrival(1, 0.5, 8, 2)])
    alone, ahead = (Setting(LIMITS, 200, overlap=overlap).run(made, STEP, "fifo") for overlap in (False, True))
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
    assert (found.rejected, len(found.total)) == (1, 1)


def test_a_shared_prefix_is_found_again() -> None:
    prompt = ((7, 160),)
    found = run([Arrival(0.0, prompt, 2), Arrival(50.0, prompt, 2)])
    assert found.hit_tokens == 144  # whole pages, and at least one token is computed
    assert list(found.ttft) == [3.0, 1.0]


def test_a_reply_is_found_by_the_next_turn() -> None:
    found = run([Arrival(0.0, ((7, 32),), 33, reply=9), Arrival(90.0, ((7, 32), (9, 33), (8, 10)), 2)])
    assert found.hit_tokens == 64


def test_deadlines_that_were_missed_are_counted() -> None:
    made = [Arrival(0.0, ((n + 1, 8),), 10, deadline_s=limit) for n, limit in enumerate((9.5, 10.0, 11.0))]
    found = run(made)
    assert (found.deadlines, found.late) == (3, 1)


def test_a_step_is_charged_for_what_it_computes() -> None:
    loads: list[Load] = []

    class Noting:
        def seconds(self, load: Load) -> float:
            loads.append(load)
            return 1.0

    Setting(LIMITS, 200).run(Trace("made", [arrival(0, 0.0, 100, 2), arrival(1, 0.0, 5, 1)]), Noting(), "fifo")
    assert loads == [
        Load(rows=1, tokens=64, context=64, pairs=64 * 65 / 2, logits=0, longest=64),
        Load(rows=2, tokens=41, context=105, pairs=sum(range(65, 101)) + 15, logits=2, longest=36),
        Load(rows=1, tokens=1, context=101, pairs=101, logits=1),
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 120), st.integers(1, 40)), min_size=1, max_size=25),
    st.booleans(),
)
def test_every_token_is_accounted_for(drawn: list[tuple[float, int, int]], overlap: bool) -> None:
    made = [arrival(n, at, prompt, out) for n, (at, prompt, out) in enumerate(sorted(drawn))]
    cost = Linear(0.1, row_s=0.01, token_s=0.001, context_s=1e-5)
    found = Setting(LIMITS, 30, overlap=overlap).run(Trace("made", made), cost, "fifo")
    assert found.output_tokens == sum(out for _, _, out in drawn) == len(found.ttft) + len(found.itl)
    assert len(found.total) == len(found.queue) == len(made)
    assert min(found.queue) >= 0 and found.busy <= found.seconds + 1e-6
    assert all(latency >= 0.1 for latency in [*found.ttft, *found.itl])


def test_a_simulation_is_the_same_every_time() -> None:
    trace = read_trace("chat:rate=1,requests=40")
    setting = Setting(Limits(256, 8, 8192), 2000)
    cost = Linear(0.02, row_s=0.001)
    first, second = (setting.run(trace, cost, "fifo") for _ in range(2))
    assert first == second
    assert first.hit_tokens > 0


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidValue, match="fifo"):
        Setting(LIMITS, 20).run(Trace("made", [arrival(0, 0, 1, 1)]), STEP, "lottery")


def test_a_summary_counts_rates_over_simulated_time() -> None:
    summary = Summary.of(run([arrival(0, 0.0, 10, 4), arrival(1, 0.0, 10, 4)]))
    assert summary.output_tokens_per_s == 2.0
    assert summary.ttft.p50 == summary.itl.p99 == 1.0
    assert (summary.requests, summary.rows_per_step) == (2, 2.0)
    lines = {line[0]: line[1:] for line in rows({"a": summary, "b": summary})}
    assert lines["TTFT p50, ms"] == ("1000.00", "1000.00")
