"""The native engine's choices among logits keep exactly what the ops' rules keep, on vocabularies too large to sort."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.unit.cpu_plugin.taped import LEVELS, run

from lineshaft_contract.ops import logits as rules
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import SampleProblem

FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 0.0, 0.0), (1.0, 1, 0.0, 0.0), (0.7, 50, 0.0, 0.0), (1.0, 5000, 0.0, 0.0), (1.0, 0, 0.9, 0.0),
    (2.0, 0, 0.97, 0.0), (0.8, 40, 0.9, 0.05), (1.0, 0, 0.0, 0.02), (1.0, 3000, 0.99, 0.01), (1.0, 3, 1e-6, 0.0),
    (1.0, 10**6, 1.0, 0.0), (1e-20, 0, 0.5, 0.0), (0.0, 5, 0.5, 0.0),
]  # fmt: skip
"""One row each."""
KINDS = ("normal", "rounded", "equal", "masked", "peaked", "spread", "outlier", "tiny")


def problem(x: HostArray, **fields: Any) -> SampleProblem:
    return SampleProblem(dtype=x.dtype.name, rows=len(x), vocab=x.shape[1], **fields)


def rows_of(kind: str, vocab: int, rows: int = len(FILTERS)) -> HostArray:
    """f32[rows, vocab]"""
    rng = np.random.default_rng([vocab, KINDS.index(kind)])
    x = rng.standard_normal((rows, vocab)) * (8.0 if kind == "peaked" else 2.0)
    if kind == "rounded":  # many ties at every border
        x = np.round(x)
    if kind == "equal":
        x[:] = -0.0
        x[:, ::3] = 0.0
    if kind == "masked":
        x[:, ::3], x[:, -4:] = -np.inf, -np.inf
    if kind == "spread":  # halves of what float32 holds: differences overflow
        x *= 2.0**125 / np.abs(x).max() * 2
    if kind == "outlier":
        x[:, 7] = 1e30
        x[:, 9] = -1e30
    if kind == "tiny":
        x *= 1e-42
    return x.astype(np.float32)


def params_of(filters: list[tuple[float, int, float, float]]) -> dict[str, HostArray]:
    temperature, top_k, top_p, min_p = zip(*filters, strict=True)
    wide = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    return {"top_k": np.array(top_k, np.int32), **{key: np.array(v, np.float32) for key, v in wide.items()}}


def clear_u(x: HostArray, params: dict[str, HostArray], picks: HostArray) -> tuple[HostArray, HostArray]:
    """(u f32[R, 1], ids): for each row a u amid the share of one of its kept tokens, and that token."""
    us, ids = [], []
    for row, pick in zip(range(len(x)), picks, strict=True):
        own = {key: params[key][row].item() for key in params}
        if own["temperature"] == 0:
            us.append(0.5)
            ids.append(int(np.argmax(x[row])))
            continue
        scaled = x[row].astype(np.float64) / own["temperature"]
        order, weights = rules.kept_tokens(scaled, own["top_k"], own["top_p"], own["min_p"])
        by_id = np.argsort(order)
        shares = weights[by_id] / weights.sum()
        likely = np.flatnonzero(shares >= 0.5 * shares.max())
        at = likely[int(pick * len(likely))]
        us.append(shares[:at].sum() + shares[at] / 2)
        ids.append(int(order[by_id][at]))
    return np.array(us, np.float32)[:, None], np.array(ids, np.int32)


@pytest.mark.parametrize("vocab", [37, 1500, 70_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_token_that_u_lies_in(kind: str, vocab: int) -> None:
    x, params = rows_of(kind, vocab), params_of(FILTERS)
    picks = np.random.default_rng(5).random(len(x))
    if vocab == 70_000:  # amid a share of 1 / 70 000 float32 does not tell tokens apart
        picks[:] = 0.0
    u, expected = clear_u(x, params, picks)
    assert run("cpu_sample", problem(x), x, params, u)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_level_samples_alike(level: str, dtype: Any) -> None:
    x = rows_of("normal", 3001).astype(dtype)
    params = params_of(FILTERS)
    u, expected = clear_u(x.astype(np.float32), params, np.full(len(x), 0.6))
    assert run("cpu_sample", problem(x), x, params, u, level=level)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("filters", [f for f in FILTERS if f[0] >= 0.7 and f[1] < 10**5])
@pytest.mark.parametrize("kind", ["normal", "rounded", "masked", "peaked"])
def test_the_last_kept_token_is_the_references(kind: str, filters: tuple[float, int, float, float]) -> None:
    """A u just below 1 takes the kept token of the highest id: one token too many or too few would show."""
    x = np.ascontiguousarray(rows_of(kind, 20_000, 4))
    at = np.argsort(-x, axis=1, kind="stable")
    ordered = np.take_along_axis(x, at, 1)  # descending, so that the last kept id is how many are kept
    params = params_of([filters] * 4)
    u = np.full((4, 1), np.nextafter(np.float32(1), np.float32(0)))
    got = run("cpu_sample", problem(ordered), ordered, params, u)[0]
    for row in range(4):
        scaled = ordered[row].astype(np.float64) / params["temperature"][row]
        others = (float(params[key][row]) for key in ("top_p", "min_p"))
        order, weights = rules.kept_tokens(scaled, filters[1], *others)
        gathered = np.cumsum(weights)
        low, high = np.searchsorted(gathered, gathered[-1] * np.array([1 - 4e-6, 1 + 4e-6]), side="right")
        assert order[min(low, len(order) - 1)] <= got[row] <= order[min(high, len(order) - 1)]
        assert got[row] <= order.max()


def test_rows_that_give_no_token() -> None:
    x = rows_of("normal", 5000, 6)
    x[0, 4321], x[1], x[2, 4999], x[3] = np.nan, -np.inf, np.nan, -np.inf
    params = params_of(
        [(1.0, 0, 0.9, 0.0), (1.0, 0, 0.9, 0.0), (0.0, 0, 0.0, 0.0), (0.0, 0, 0.0, 0.0)] + [FILTERS[2]] * 2
    )
    params["min_p"][5] = 1.5
    got = run("cpu_sample", problem(x), x, params, np.full((6, 1), 0.3, np.float32))[0]
    assert got[[0, 1, 2, 3, 5]].tolist() == [-1] * 5
    assert got[4] in np.argsort(-x[4])[:50]


def test_a_row_does_not_depend_on_its_neighbours_or_its_thread() -> None:
    x, params = rows_of("normal", 9000), params_of(FILTERS)
    u = np.random.default_rng(1).random((len(x), 1)).astype(np.float32)
    together = run("cpu_sample", problem(x), x, params, u)[0]
    for r in range(len(x)):
        own = {key: value[r : r + 1] for key, value in params.items()}
        assert run("cpu_sample", problem(x[r : r + 1]), x[r : r + 1], own, u[r : r + 1], threads=1)[0][0] == together[r]


# ---- logprobs ------------------------------------------------------------------------------------------------------


def expected_logprobs(x: HostArray, ids: HostArray, k: int) -> Any:
    with np.errstate(all="ignore"):
        return rules.logprobs(problem(x, top=k), x, ids, k)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("vocab", "k"), [(37, 37), (3000, 20), (3000, 2500), (70_000, 5)])
def test_logprobs_rank_as_the_reference_does(level: str, vocab: int, k: int) -> None:
    x = np.concatenate(
        [rows_of(kind, vocab, 1) for kind in ("normal", "rounded", "equal", "masked", "outlier", "tiny")]
    )
    ids = np.array([0, -1, vocab - 1, 1, 7, 5], np.int32)
    chosen, top_ids, top = run("cpu_logprobs", problem(x, top=k), x, ids, k, level=level)
    wanted, wanted_ids, wanted_top = expected_logprobs(x.astype(np.float64), ids, k)
    assert np.array_equal(top_ids, wanted_ids)
    np.testing.assert_allclose(chosen, wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(top, wanted_top, rtol=1e-6, atol=1e-6)


def test_logprobs_of_rows_without_a_distribution() -> None:
    x = rows_of("masked", 50, 4)
    x[1, 30], x[2] = np.nan, -np.inf
    x[3, 1:] = -np.inf
    x[3, 0] = 2.0
    ids = np.array([0, 3, 0, 0], np.int32)
    chosen, top_ids, top = run("cpu_logprobs", problem(x, top=50), x, ids, 50)
    wanted, wanted_ids, wanted_top = expected_logprobs(x.astype(np.float64), ids, 50)
    assert np.array_equal(top_ids, wanted_ids)
    np.testing.assert_allclose(chosen, wanted, atol=1e-6)
    np.testing.assert_allclose(top, wanted_top, atol=1e-6)


def test_an_id_beyond_the_vocabulary_has_no_logprob() -> None:
    x = rows_of("masked", 50, 3)
    chosen, *_ = run("cpu_logprobs", problem(x, top=0), x, np.array([50, 2**31 - 1, 3], np.int32), 0)
    assert np.isnan(chosen).tolist() == [True, True, False]


# ---- apply_logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_edits", [False, True])
def test_edits_and_masks_of_a_large_vocabulary(dtype: Any, with_mask: bool, with_edits: bool) -> None:
    rng = np.random.default_rng(2)
    rows, vocab = 5, 70_001
    x = rng.standard_normal((rows, vocab)).astype(dtype)
    kwargs: dict[str, Any] = {}
    if with_mask:
        kwargs["mask"] = rng.integers(0, 2**32, (rows, -(-vocab // 32)), dtype=np.uint32)
        kwargs["mask"][1], kwargs["mask"][2] = 0, 0xFFFFFFFF
    if with_edits:
        ids = np.stack([rng.permutation(vocab)[:40] for _ in range(rows)]).astype(np.int32)
        ids[:, 7], ids[0, 8] = vocab, vocab - 1
        scale, bias = (rng.uniform(0.5, 2.0, ids.shape).astype(np.float32) for _ in range(2))
        scale[:, 9], bias[:, 10], bias[ids == vocab] = 0.0, -np.inf, np.nan
        kwargs |= {"edit_ids": ids, "edit_scale": scale, "edit_bias": bias}
    used = problem(x, mask=with_mask, edits=40 * with_edits)
    got = run("cpu_apply_logits", used, x, **kwargs)[0].astype(np.float64)
    wanted = rules.apply_logits(used, x, **kwargs).astype(dtype).astype(np.float64)
    eps = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(got, wanted, rtol=eps, atol=eps)
    assert np.array_equal(got == -np.inf, wanted == -np.inf)
