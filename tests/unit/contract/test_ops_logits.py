"""The references of sample, argmax, logprobs and apply_logits: filters in order, ties, borders, broken rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft_contract.ops.logits import allowed_tokens, apply_logits, argmax, kept_tokens, logprobs, sample
from lineshaft_contract.problems import SampleProblem

INF = math.inf


def params(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0, min_p: float = 0.0, typical_p: float = 0.0
) -> dict[str, Any]:
    floats = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    out = {name: np.full(rows, value, np.float32) for name, value in floats.items()}
    return {**out, "top_k": np.full(rows, top_k, np.int32)}


def draw(logits: Any, u: Any, **fields: Any) -> list[int]:
    """Sample the same row of logits once for each u."""
    u = np.atleast_1d(np.asarray(u, np.float32))
    rows = np.tile(np.asarray(logits, np.float64), (len(u), 1))
    problem = SampleProblem(dtype="float32", rows=len(u), vocab=rows.shape[1])
    got = sample(problem, rows, params(len(u), **fields), u[:, None])
    assert got.dtype == np.int32
    return [int(token) for token in got]


def counts(logits: Any, grid: int = 20000, **fields: Any) -> Any:
    """How often each token is drawn over an even grid of u."""
    u = (np.arange(grid) + 0.5) / grid
    return np.bincount(draw(logits, u, **fields), minlength=len(logits)) / grid


def softmax(x: Any) -> Any:
    weights = np.exp(np.asarray(x, float) - np.max(x))
    return weights / weights.sum()


LOGITS = np.array([0.3, 2.0, -1.0, 1.0, 2.5, 0.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_shares_over_a_grid_of_u_are_the_softmax(temperature: float) -> None:
    np.testing.assert_allclose(counts(LOGITS, temperature=temperature), softmax(LOGITS / temperature), atol=1e-4)


def test_inverse_cdf_runs_in_id_order() -> None:
    bounds = np.cumsum(softmax(LOGITS))
    for token, (low, high) in enumerate(zip([0.0, *bounds[:-1]], bounds, strict=True)):
        assert draw(LOGITS, [low + 1e-4, high - 1e-4]) == [token, token]
    assert draw(LOGITS, [0.0, 1 - 2**-24]) == [0, 5]


def test_temperature_zero_takes_the_lowest_of_the_largest_whatever_the_filters() -> None:
    tied = [1.0, 5.0, 2.0, 5.0]
    assert draw(tied, [0.0, 0.99], temperature=0.0, top_k=1, top_p=0.1, min_p=0.9) == [1, 1]
    assert draw(tied, 0.5, temperature=0.0) == [1]


@pytest.mark.parametrize(("top_k", "kept"), [(1, [4]), (2, [4, 1]), (4, [4, 1, 3, 0]), (6, range(6)), (99, range(6))])
def test_top_k_keeps_the_largest(top_k: int, kept: Any) -> None:
    expected = np.zeros(6)
    expected[list(kept)] = softmax(LOGITS[list(kept)])
    np.testing.assert_allclose(counts(LOGITS, top_k=top_k), expected, atol=1e-4)


def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_a_tie() -> None:
    tied = np.array([0.0, 2.0, 2.0, 5.0, 2.0])
    assert sorted(kept_tokens(tied, 3, 0.0, 0.0)[0]) == [1, 2, 3]
    assert set(draw(tied, np.linspace(0, 0.999, 50), top_k=2)) == {1, 3}


def test_top_p_keeps_the_shortest_run_that_reaches_it() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    for top_p, kept in ((0.35, {1}), (0.45, {1, 3}), (0.69, {1, 3}), (0.75, {1, 3, 2}), (0.95, {0, 1, 2, 3})):
        assert set(draw(logits, np.linspace(0, 0.999, 200), top_p=top_p)) == kept
    assert len(set(draw(logits, np.linspace(0, 0.999, 200), top_p=1e-9))) == 1


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_top_p_of_zero_or_one_keeps_all(top_p: float) -> None:
    np.testing.assert_allclose(counts(LOGITS, top_p=top_p), softmax(LOGITS), atol=1e-4)


def test_top_p_counts_within_what_top_k_kept() -> None:
    logits = np.log([0.25, 0.25, 0.2, 0.15, 0.15])
    # of the two that top_k keeps, the first already holds half: 0.45 is reached at once, though 0.25 of all is not
    assert set(draw(logits, np.linspace(0, 0.999, 100), top_k=2, top_p=0.45)) == {0}


def test_min_p_compares_with_the_largest_probability_after_temperature() -> None:
    logits = np.log([0.5, 0.26, 0.2, 0.04])
    assert set(draw(logits, np.linspace(0, 0.999, 200), min_p=0.5)) == {0, 1}
    assert set(draw(logits, np.linspace(0, 0.999, 200), min_p=0.5, temperature=2.0)) == {0, 1, 2}


def test_masked_tokens_are_never_drawn() -> None:
    logits = [-INF, 1.0, -INF, 0.0, -INF]
    assert set(draw(logits, np.linspace(0, 1 - 2**-24, 99))) == {1, 3}
    assert set(draw(logits, [0.0, 1 - 2**-24], top_k=4)) == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_a_nan_or_without_a_token_gives_minus_one(temperature: float) -> None:
    assert draw([0.0, math.nan, 9.0], 0.5, temperature=temperature) == [-1]
    assert draw([-INF, -INF], 0.5, temperature=temperature) == [-1]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8), min_size=1, max_size=12),
    u=st.floats(0, 1, exclude_max=True, width=32),
    top_k=st.integers(0, 13),
    top_p=st.floats(0, 1, width=32),
    min_p=st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_finite_row_always_gives_a_token_that_the_filters_keep(
    logits: list[int], u: float, top_k: int, top_p: float, min_p: float
) -> None:
    x = np.array(logits) / 4.0
    [token] = draw(x, u, top_k=top_k, top_p=top_p, min_p=min_p)
    kept, _ = kept_tokens(x, top_k, float(np.float32(top_p)), float(np.float32(min_p)))
    assert token in kept
    assert int(np.argmax(x)) in kept
    assert len(kept) <= (top_k or len(x))


def test_argmax_takes_the_lowest_index() -> None:
    logits = np.array([[1.0, 7.0, 7.0], [-3.0, -2.0, -9.0], [4.0, 4.0, 4.0]])
    assert argmax(SampleProblem(dtype="float32", rows=3, vocab=3), logits).tolist() == [1, 1, 0]


def test_logprobs_are_the_log_of_the_softmax_in_descending_order() -> None:
    problem = SampleProblem(dtype="float32", rows=2, vocab=6, top=4)
    rows = np.stack([LOGITS, LOGITS[::-1]])
    chosen, ids, top = logprobs(problem, rows, np.array([2, 2], np.int32), 4)
    assert ids.tolist() == [[4, 1, 3, 0], [1, 4, 2, 5]]
    np.testing.assert_allclose(chosen, np.log([softmax(LOGITS)[2], softmax(LOGITS[::-1])[2]]), rtol=1e-12)
    np.testing.assert_allclose(top[0], np.log(softmax(LOGITS))[[4, 1, 3, 0]], rtol=1e-12)


def test_logprobs_break_ties_by_id_and_hold_for_large_logits() -> None:
    problem = SampleProblem(dtype="float32", rows=1, vocab=4, top=4)
    chosen, ids, top = logprobs(problem, np.array([[900.0, 901.0, 900.0, 901.0]]), np.array([3], np.int32), 4)
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert chosen[0] == top[0, 1] == pytest.approx(-math.log(2 + 2 / math.e))


def test_logprobs_of_an_unsampled_row() -> None:
    problem = SampleProblem(dtype="float32", rows=2, vocab=2)
    chosen, ids, top = logprobs(problem, np.array([[math.nan, 0.0], [-INF, -INF]]), np.array([-1, -1], np.int32), 0)
    assert np.isnan(chosen).all()
    assert ids.shape == top.shape == (2, 0)


def test_masks_count_bits_from_the_lowest_of_the_first_word() -> None:
    mask = np.zeros((1, 2), np.uint32)
    mask[0, 0], mask[0, 1] = (1 << 0) | (1 << 31), 1 << 1
    assert np.flatnonzero(allowed_tokens(mask, 40)).tolist() == [0, 31, 33]
    logits = np.arange(40.0)[None]
    problem = SampleProblem(dtype="float32", rows=1, vocab=40, mask=True)
    got = apply_logits(problem, logits, mask=mask)
    assert {i: got[0, i] for i in np.flatnonzero(got[0] > -INF)} == {0: 0.0, 31: 31.0, 33: 33.0}


def edit(logits: Any, ids: Any, scale: Any, bias: Any) -> Any:
    problem = SampleProblem(dtype="float32", rows=1, vocab=len(logits), edits=len(ids))
    arrays = {"edit_ids": np.array([ids], np.int32), "edit_scale": np.array([scale]), "edit_bias": np.array([bias])}
    return apply_logits(problem, np.array([logits], np.float64), **arrays)[0].tolist()


def test_edits_scale_by_sign_then_add_and_leave_the_rest() -> None:
    assert edit([2.0, -2.0, 5.0, 0.0], [1, 0, 3], [4.0, 4.0, 4.0], [0.5, 0.25, 1.0]) == [0.75, -7.5, 5.0, 1.0]


def test_padding_zeros_and_bans() -> None:
    assert edit([2.0, -2.0], [2, 2], [math.nan, 0.0], [7.0, math.nan]) == [2.0, -2.0]
    assert edit([2.0, -2.0], [0, 0, 0], [0.0] * 3, [0.0] * 3) == [2.0, -2.0]
    assert edit([2.0, -2.0, -INF], [1, 2], [2.0, 2.0], [-INF, 3.0]) == [2.0, -INF, -INF]


def test_typical_tokens_are_those_near_the_entropy_not_the_likeliest() -> None:
    logits = np.log([0.5, 0.2, 0.15, 0.1, 0.05])  # the entropy is that of a token of 0.26
    assert set(draw(logits, np.linspace(0, 0.999, 50), typical_p=0.1)) == {1}
    assert set(draw(logits, np.linspace(0, 0.999, 50), typical_p=0.3)) == {1, 2}
    for off in (0.0, 1.0):
        np.testing.assert_allclose(counts(logits, typical_p=off), np.exp(logits), atol=1e-4)
