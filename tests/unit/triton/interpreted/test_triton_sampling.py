"""Sampling, against the contract's reference: what its cases do not see, in particular rows cut into many blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.logits import logprobs as reference_logprobs
from lineshaft_contract.ops.logits import sample as reference_sample
from lineshaft_contract.ops.run import rounded
from lineshaft_contract.problems import Problem, SampleProblem
from lineshaft_torch.arrays import from_host, to_host

Arrays = dict[str, np.ndarray[Any, Any]]
Bind = Callable[[str, Problem], Any]
NUDGE = 1e-5
"""Relative: within it of a border, float32 weights and float64 ones may take different sides."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations that are compiled, with fewer values: rows of many spans of several blocks, few pivots."""
    from lineshaft_triton.kernels import logits_scan

    monkeypatch.setattr(logits_scan, "interpreting", lambda: False)
    monkeypatch.setattr(logits_scan, "BLOCK", 16)
    monkeypatch.setattr(logits_scan, "SPAN", 2)


def drawn(bind: Bind, dtype: str, logits: np.ndarray[Any, Any], params: Arrays, u: np.ndarray[Any, Any]) -> Any:
    problem = SampleProblem(dtype=dtype, rows=len(logits), vocab=logits.shape[1])
    given = {name: from_host(value) for name, value in params.items()}
    return to_host(bind("triton_sample", problem)(from_host(logits), given, from_host(u)))


def allowed(logits: np.ndarray[Any, Any], params: Arrays, u: np.ndarray[Any, Any]) -> list[set[int]]:
    """The reference's ids, and those it gives when a parameter moves a little: what a border decides is free."""
    problem = SampleProblem(dtype="float32", rows=len(logits), vocab=logits.shape[1])
    found: list[set[int]] = [set() for _ in logits]
    for name in (None, "u", "top_p", "min_p"):
        for by in (1 - NUDGE, 1 + NUDGE):
            moved: Mapping[str, Any] = {**params, **({name: params[name] * by} if name in params else {})}
            own = np.clip(u * by, 0, 1 - NUDGE) if name == "u" else u
            for row, chosen in enumerate(reference_sample(problem, logits.astype(np.float64), moved, own)):
                found[row].add(int(chosen))
    return found


def check(bind: Bind, dtype: str, logits: np.ndarray[Any, Any], params: Arrays, u: np.ndarray[Any, Any]) -> None:
    got = drawn(bind, dtype, logits, params, u)
    with np.errstate(invalid="ignore"):
        expected = allowed(logits, params, u)
    assert all(int(own) in ids for own, ids in zip(got, expected, strict=True)), (got, expected)


LADDER = [-8.0, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0, 3.0]
VALUES = {
    "ties": st.sampled_from(LADDER),
    "masked": st.sampled_from([-np.inf, -np.inf, -1.0, 0.0, 2.0]),
    "spread": st.floats(-30, 30, width=16),
    "any": st.floats(-(2.0**126), 2.0**126, width=32),
}


LIMITS = {"float32": (-(2.0**126), 2.0**126), "bfloat16": (-(2.0**126), 2.0**126), "float16": (-6e4, 6e4)}


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, np.ndarray[Any, Any], Arrays, np.ndarray[Any, Any]]:
    rows, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    kind = draw(st.sampled_from(sorted(VALUES)))
    lists = st.lists(VALUES[kind], min_size=vocab, max_size=vocab)
    values = np.array(draw(st.lists(lists, min_size=rows, max_size=rows)))
    values[np.isfinite(values)] = np.clip(values[np.isfinite(values)], *LIMITS[dtype])

    def column(options: list[float], kind: Any) -> np.ndarray[Any, Any]:
        return np.array(draw(st.lists(st.sampled_from(options), min_size=rows, max_size=rows)), kind)

    params = {
        "temperature": column([0.0, 0.1, 1.0, 1.0, 2.5], np.float32),
        "top_k": column([0, 0, 1, 3, vocab // 2, vocab, vocab + 5], np.int32),
        "top_p": column([0.0, 0.0, 0.01, 0.3, 0.75, 0.97, 1.0], np.float32),
        "min_p": column([0.0, 0.0, 0.02, 0.3], np.float32),
    }
    u = np.array(draw(st.lists(st.floats(0, 0.9990234375, width=32), min_size=rows, max_size=rows)), np.float32)[
        :, None
    ]
    return dtype, rounded(values, dtype), params, u


ONCE = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate],
)  # fmt: skip
"""An example takes a tenth of a second, so that shrinking one would take minutes."""


@ONCE
@given(step=steps())
def test_rows_of_one_block(bind: Bind, step: Any) -> None:
    check(bind, *step)


@settings(ONCE, max_examples=20)
@given(step=steps())
def test_rows_of_many_blocks(bind: Bind, small_blocks: None, step: Any) -> None:
    check(bind, *step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_vocabulary(bind: Bind, dtype: str) -> None:
    rng = np.random.default_rng(7)
    logits = rounded(rng.standard_normal((4, 130_001)) * 3, dtype)
    params = {
        "temperature": np.array([1.0, 0.7, 1.3, 0.0], np.float32),
        "top_k": np.array([50, 0, 4000, 9], np.int32),
        "top_p": np.array([0.9, 0.95, 0.5, 0.2], np.float32),
        "min_p": np.array([0.0, 0.01, 0.0, 0.9], np.float32),
    }
    check(bind, dtype, logits, params, rng.random((4, 1), np.float32))


def test_the_same_ids_however_a_row_is_cut(bind: Bind, monkeypatch: pytest.MonkeyPatch) -> None:
    from lineshaft_triton.kernels import logits_scan

    rng = np.random.default_rng(3)
    logits = rounded(rng.standard_normal((1, 300)) * 2, "bfloat16")
    params = {"temperature": [0.9], "top_p": [0.8], "min_p": [0.01]}
    arrays: Arrays = {name: np.array(value, np.float32) for name, value in params.items()}
    arrays["top_k"] = np.array([40], np.int32)
    shares = [np.array([[share]], np.float32) for share in (0.0, 0.4, 0.999)]
    whole = [int(drawn(bind, "bfloat16", logits, arrays, u)[0]) for u in shares]
    monkeypatch.setattr(logits_scan, "interpreting", lambda: False)
    monkeypatch.setattr(logits_scan, "BLOCK", 64)
    monkeypatch.setattr(logits_scan, "SPAN", 4)
    assert [int(drawn(bind, "bfloat16", logits, arrays, u)[0]) for u in shares] == whole


def test_a_temperature_next_to_nothing_takes_the_largest(bind: Bind) -> None:
    logits = np.array([[1.0, 4.0, 3.0, 4.0]], np.float32)
    params = {"temperature": np.array([1e-44], np.float32), "top_k": np.array([0], np.int32)}
    params |= {name: np.zeros(1, np.float32) for name in ("top_p", "min_p")}
    taken = [drawn(bind, "float32", logits, params, np.array([[u]], np.float32))[0] for u in (0.0, 0.4, 0.6, 0.99)]
    assert taken == [1, 1, 3, 3]


def test_log_probabilities_of_many_blocks(bind: Bind, small_blocks: None) -> None:
    rng = np.random.default_rng(5)
    logits = rounded(np.round(rng.standard_normal((2, 61)) * 2), "bfloat16")  # many ties
    logits[1, 10:] = -np.inf
    problem = SampleProblem(dtype="bfloat16", rows=2, vocab=61, top=20)
    got = bind("triton_logprobs", problem)(from_host(logits), torch.tensor([3, -1], dtype=torch.int32), 20)
    exact = reference_logprobs(problem, logits.astype(np.float64), np.array([3, -1]), 20)
    assert np.array_equal(to_host(got[1]), exact[1])
    np.testing.assert_allclose(to_host(got[0]), exact[0], rtol=1e-5)
    np.testing.assert_allclose(to_host(got[2]), exact[2], rtol=1e-5)


def test_the_largest_of_many_blocks(bind: Bind, small_blocks: None) -> None:
    logits = np.full((3, 61), -1.0, np.float32)
    logits[0, [17, 40]], logits[1, 60], logits[2, 30] = 2.0, 2.0, np.nan
    argmax = bind("triton_argmax", SampleProblem(dtype="float32", rows=3, vocab=61))
    assert to_host(argmax(from_host(logits))).tolist() == [17, 60, -1]


def test_infinity_is_a_largest_logit(bind: Bind, small_blocks: None) -> None:
    """Of many blocks, in one that has no largest value elsewhere; and a NaN beside it is seen."""
    logits = np.random.default_rng(6).standard_normal((4, 61)).astype(np.float32)
    logits[0, [33, 50]], logits[1, :], logits[2, 3], logits[2, 40] = np.inf, np.inf, np.inf, np.nan
    wanted = [33, 0, -1, int(logits[3].argmax())]
    problem = SampleProblem(dtype="float32", rows=4, vocab=61)
    assert to_host(bind("triton_argmax", problem)(from_host(logits))).tolist() == wanted
    params = {name: np.zeros(4, np.int32 if name == "top_k" else np.float32) for name in ("top_k", "top_p", "min_p")}
    for heat in (0.0, 0.7):  # of a row with +inf there is one token to draw
        given = params | {"temperature": np.array([heat, heat, heat, 0], np.float32)}
        assert drawn(bind, "float32", logits, given, np.full((4, 1), 0.5, np.float32)).tolist() == wanted


def test_no_row_at_all(bind: Bind) -> None:
    argmax = bind("triton_argmax", SampleProblem(dtype="float32", rows=0, vocab=61))
    assert to_host(argmax(torch.empty((0, 61)))).tolist() == []


def test_what_is_declined(kernels: dict[str, Kernel]) -> None:
    problem = SampleProblem(dtype="float64", rows=1, vocab=9)
    for name in ("triton_sample", "triton_argmax", "triton_logprobs", "triton_apply_logits"):
        assert "float64" in (kernels[name].supports(problem) or ""), name
    many = replace(problem, dtype="float32", vocab=99, top=65)
    assert "at most 64 alternatives, not 65" in (kernels["triton_logprobs"].supports(many) or "")
    assert "typical" not in kernels["triton_sample"].handles
