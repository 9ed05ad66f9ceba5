"""The cost model and the lengths of outputs: what is learned from what was seen."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Limits, Request, Scheduler, Score, StepCost, fit
from lineshaft.scheduler.cost import IN_TOKENS, request_cost
from lineshaft.scheduler.lengths import ENOUGH, MOST, OutputLengths


def samples(cost: StepCost, rng: random.Random, noise: float = 0.0) -> list[tuple[int, int, int, float]]:
    found = []
    for _ in range(200):
        rows, prefill = rng.randint(0, 64), rng.choice([0, 0, rng.randint(1, 500)])
        held = rows, prefill, rows * rng.randint(1, 2000) + prefill
        found.append((*held, cost.step_seconds(*held) * (1 + noise * rng.uniform(-1, 1))))
    return found


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 7.0]), min_size=4, max_size=4), st.integers(0, 2**32))
def test_the_fit_finds_the_coefficients_again(shares: list[float], seed: int) -> None:
    true = StepCost(5e-3 * shares[0], 1e-4 * shares[1], 2e-5 * shares[2], 1e-8 * shares[3])
    seen = samples(true, random.Random(seed))
    found = fit(seen)
    for *held, seconds in seen:
        assert found.step_seconds(*held) == pytest.approx(seconds, rel=1e-4, abs=1e-7)  # the ridge is 1e-9 of a square


def test_no_coefficient_is_negative_and_noise_averages_out() -> None:
    true = StepCost(5e-3, 1e-4, 2e-5, 1e-8)
    found = fit(samples(true, random.Random(1), noise=0.3))
    assert min(found.step, found.decode_row, found.prefill_token, found.context_token) >= 0
    assert found.step_seconds(32, 0, 32000) == pytest.approx(true.step_seconds(32, 0, 32000), rel=0.1)
    falling = fit([(rows, 0, 0, 1.0 - rows / 100) for rows in range(50)])
    assert falling.decode_row == 0.0 and falling.step == pytest.approx(0.755)
    assert fit([]) == StepCost()


def test_columns_that_are_equal_do_not_break_the_fit() -> None:
    found = fit([(rows, 0, rows, 1e-3 * rows) for rows in range(1, 20)])
    assert found.step_seconds(10, 0, 10) == pytest.approx(1e-2, rel=1e-3)


def test_the_cost_of_a_request_in_tokens() -> None:
    cost = request_cost(IN_TOKENS, chunk=16, prompt=40, cached=8, output=5, pages=3)
    assert (cost.output, cost.pages, cost.steps, cost.seconds) == (5, 3, 2 + 4, 32 + 4)


def test_scores_know_size_and_direction_of_errors() -> None:
    score = Score()
    for predicted, actual in ((3.0, 1.0), (2.0, 6.0)):
        score.add(predicted, actual)
    assert (score.count, score.mean_absolute_error, score.bias) == (2, 3.0, -1.0)
    assert score.relative_error == pytest.approx(6 / 7) and Score().bias == 0.0


def test_lengths_are_told_apart_by_tenant_and_prompt() -> None:
    lengths = OutputLengths()
    for _ in range(ENOUGH):
        lengths.add(b"a", 100, 10)
        lengths.add(b"a", 1000, 300)
        lengths.add(b"b", 100, 1)
    near = {length: lengths.quantile(*length, 0.5) for length in ((b"a", 90), (b"a", 1023), (b"b", 100))}
    assert near[b"b", 100] == 1
    assert 8 <= (near[b"a", 90] or 0) <= 12 and 250 <= (near[b"a", 1023] or 0) <= 360
    assert lengths.quantile(b"a", 5000, 0.9) == near[b"a", 1023], "another length of prompt: all of the tenant"
    assert lengths.quantile(b"c", 5, 0.1) == 1, "another tenant: all"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=ENOUGH, max_size=200), st.sampled_from([0.1, 0.5, 0.9]))
def test_quantiles_are_right_to_within_a_bin(outputs: list[int], share: float) -> None:
    lengths = OutputLengths()
    for output in outputs:
        lengths.add(b"", 1, output)
    exact = sorted(outputs)[max(0, -(-int(share * 10) * len(outputs) // 10) - 1)]
    assert lengths.quantile(b"", 1, share) == pytest.approx(exact, rel=0.34, abs=1)


def test_lengths_follow_change_and_do_not_grow_without_bound() -> None:
    lengths = OutputLengths()
    for _ in range(2000):
        lengths.add(b"a", 1, 1000)
    for _ in range(1200):
        lengths.add(b"a", 1, 2)
    assert lengths.quantile(b"a", 1, 0.5) == 2
    for number in range(2 * MOST):
        lengths.add(b"%d" % number, 1, 5)
    assert len(lengths._bins) <= MOST


def test_the_scheduler_learns_from_timed_steps() -> None:
    engine = Scheduler(Limits(64, 4, 256), CacheManager([GroupSpec(200, 4)]))
    true = StepCost(1e-3, 1e-4, 1e-5, 1e-7)
    for number in range(12):
        engine.add(Request(number, tuple(range(20 + number)), SamplingParams(max_tokens=20)))
    while engine.has_work:
        batch = engine.schedule()
        decodes = sum(row.count == 1 for row in batch.rows)
        context = sum(row.start + row.count for row in batch.rows)
        engine.observe(batch, true.step_seconds(decodes, batch.tokens - decodes, context))
        engine.commit(batch, [7] * batch.samples)
    scores = engine.stats.scores
    assert scores.seconds.count > 20 and scores.seconds.relative_error < 0.05
    assert scores.steps.count == 12 and scores.steps.mean_absolute_error <= 1
