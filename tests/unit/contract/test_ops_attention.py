"""The references of attend, merge_states and latent_attend against one loop per query, and the edges they honour."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import ContractViolation
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.attention import attend, attend_problem, latent_attend, merge_states
from lineshaft_contract.ops.cases import Paging, paged_step
from lineshaft_contract.ops.run import operand
from lineshaft_contract.ops.spec import Case, HostArray
from lineshaft_contract.problems import MergeProblem

CASES = [
    case
    for case in all_ops()["attend"].cases(np.random.default_rng(3), "full")
    if case.problem.dtype == "float64" and "long" not in case.id and "32768" not in case.id
]


KeyValue = tuple[HostArray, HostArray]


def one_query(p: Any, q: HostArray, keys: list[KeyValue], sink: float | None) -> tuple[HostArray, float]:
    """Attention of one head of one query over the (key, value) pairs that it sees; (out [Dv], lse)."""
    scores = []
    for k, _ in keys:
        score = float(np.dot(q, k)) * p.scale
        scores.append(p.softcap * math.tanh(score / p.softcap) if p.softcap else score)
    lse = math.log(sum(map(math.exp, scores))) if scores else -math.inf
    whole = sum(map(math.exp, scores)) + (0.0 if sink is None else math.exp(sink))
    out = np.zeros(p.v_dim)
    for score, (_, v) in zip(scores, keys, strict=True):
        out += math.exp(score) / whole * v
    return out, lse


def stored(p: Any, cache: dict[str, HostArray], name: str, page: int, offset: int, head: int, scales: Any) -> HostArray:
    """A key or value as float64, its scale applied."""
    values = cache[name][page, offset, head].astype(np.float64)
    if p.kv_scheme == "none":
        return values
    factor = scales[int(name == "v")]
    if p.kv_scheme == "head":
        return values * factor[head]
    if p.kv_scheme == "tensor":
        return values * factor
    own = cache[f"{name}_scale"][page, offset, head].astype(np.float64) * factor
    return values * (np.repeat(own, 32) if p.kv_scheme == "block" else own)


def sees(p: Any, at: int, query: int, first: int, token: int, kwargs: dict[str, Any]) -> bool:
    """Whether the query at position `query` sees the key at position `at`; `first` is its row's first query."""
    if (p.causal and at > query) or (p.window and at <= query - p.window):
        return False
    if p.key_ranges and not kwargs["key_ranges"][token, 0] <= at < kwargs["key_ranges"][token, 1]:
        return False
    own = at - first
    if p.ancestors and own >= 0:
        return bool(int(kwargs["ancestors"][token, own // 32]) >> (own % 32) & 1)
    return True


def naive(case: Case) -> tuple[HostArray, HostArray]:
    """(out [T, Hq, Dv], lse [T, Hq]): a loop over rows, queries, heads, pages and offsets."""
    p: Any = case.problem
    q, cache, step = (operand(arg, p) for arg in case.args)
    kwargs, g = {name: operand(value, p) for name, value in case.kwargs.items()}, p.group
    bounds, table = step.arrays["query_starts"], step.arrays[f"page_table.{g}"]
    out, lse = np.zeros((len(q), p.q_heads, p.v_dim)), np.full((len(q), p.q_heads), -np.inf)
    for b, context in enumerate(step.arrays[f"context_lens.{g}"].tolist()):
        count = int(bounds[b + 1] - bounds[b])
        for j in range(count):
            token, query = int(bounds[b]) + j, context - count + j
            for head in range(p.q_heads):
                own, seen = head // (p.q_heads // p.kv_heads), []
                for column, page in enumerate(table[b].tolist()):
                    start = step.arrays[f"page_starts.{g}"][b, column] if p.page_starts else column * p.page_size
                    for offset in range(p.page_size):
                        at = int(start) + offset
                        if page and at < context and sees(p, at, query, context - count, token, kwargs):
                            where = (page, offset, own, kwargs.get("kv_scales"))
                            k = stored(p, cache, "k", *where)
                            seen.append((k, k[: p.v_dim] if p.value_in_key else stored(p, cache, "v", *where)))
                sink = float(kwargs["sinks"][head]) if p.sinks else None
                out[token, head], lse[token, head] = one_query(p, q[token, head].astype(float), seen, sink)
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attend_is_what_a_loop_over_queries_computes(case: Case) -> None:
    got = attend(case.problem, *(operand(a, case.problem) for a in case.args), **case.kwargs)  # type: ignore[arg-type]
    out, lse = naive(case)
    if isinstance(got, tuple):
        np.testing.assert_allclose(got[1], lse, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got[0] if isinstance(got, tuple) else got, out, rtol=1e-11, atol=1e-12)


def run(lengths: tuple[tuple[int, int], ...], fields: dict[str, Any] | None = None, **paging: Any) -> Any:
    """(problem, q, cache, step, paged) with normal values wherever a key is live and NaN everywhere else."""
    rng = np.random.default_rng(5)
    plan = Paging(lengths, **paging)
    problem = attend_problem("float64", plan, fields or {})
    paged = paged_step(rng, plan)
    cache = {}
    for name, dim in (("k", problem.qk_dim), ("v", problem.v_dim)):
        cache[name] = paged.fill(rng, (problem.kv_heads, dim))
        cache[name][~paged.live] = np.nan
    return problem, rng.standard_normal((plan.tokens, problem.q_heads, problem.qk_dim)), cache, paged.step, paged


def test_padding_tokens_empty_rows_and_blind_queries_give_exactly_zero() -> None:
    problem, q, cache, step, _ = run(((2, 0), (3, 1), (0, 9), (1, 4)), {"return_lse": True}, padding=3)
    q[-3:] = np.nan
    out, lse = attend(problem, q, cache, step)
    blind = [0, 1, 2, 3, 6, 7, 8]  # row 0 has no keys; of row 1 only the last query sits at position 0; then padding
    assert np.all(out[blind] == 0) and np.all(lse[blind] == -np.inf)
    assert np.all(out[[4, 5]] != 0) and np.isfinite(lse[[4, 5]]).all()


@pytest.mark.parametrize("fields", [{}, {"window": 3}, {"causal": False}, {"sinks": True}, {"value_in_key": True}])
def test_garbage_where_nothing_is_live_never_leaks(fields: dict[str, Any]) -> None:
    problem, q, cache, step, paged = run(((1, 20), (4, 33)), fields, page_size=16, padding=1)
    kwargs = {"sinks": np.zeros(problem.q_heads)} if problem.sinks else {}
    clean = {name: np.where(paged.live[..., None, None], pages, 0.0) for name, pages in cache.items()}
    assert np.isnan(cache["k"][0]).all() and np.isnan(cache["v"]).any()
    np.testing.assert_array_equal(attend(problem, q, cache, step, **kwargs), attend(problem, q, clean, step, **kwargs))


@pytest.mark.parametrize("window", [1, 2, 7])
def test_window_counts_visible_keys_including_the_query(window: int) -> None:
    problem, q, cache, step, _ = run(((1, 12),), {"window": window})
    out = attend(problem, q, cache, step)
    table = step.arrays["page_table.0"]
    for position in range(12):
        changed = {name: pages.copy() for name, pages in cache.items()}
        for pages in changed.values():
            pages[table[0, position // 16], position % 16] += 1.0
        differs = not np.array_equal(attend(problem, q, changed, step), out)
        assert differs == (position >= 12 - window)


def test_queries_sit_at_the_end_of_the_context() -> None:
    """A chunk of the last three tokens gives what three decode steps give."""
    problem, q, cache, step, _ = run(((3, 30),))
    whole = attend(problem, q, cache, step)
    for j in range(3):
        arrays = {
            **step.arrays, "query_starts": np.array([0, 1], np.int32), "context_lens.0": np.array([28 + j], np.int32)
        }  # fmt: skip
        one = attend(problem, q[j : j + 1], cache, replace(step, arrays=arrays))
        np.testing.assert_allclose(one[0], whole[j], rtol=1e-12)


def test_positions_play_no_part_in_causality() -> None:
    problem, q, cache, step, _ = run(((3, 30),))
    shifted = replace(step, arrays={**step.arrays, "positions": step.arrays["positions"] * 0 + 7})
    np.testing.assert_array_equal(attend(problem, q, cache, shifted), attend(problem, q, cache, step))


def test_soft_cap_comes_after_scale_and_before_the_mask() -> None:
    problem, q, cache, step, _ = run(((1, 2),), {"softcap": 1.5, "return_lse": True, "kv_heads": 4, "scale": 0.7})
    page = step.arrays["page_table.0"][0, 0]
    _, lse = attend(problem, q * 10, cache, step)
    for head in range(4):
        capped = [1.5 * math.tanh(float(q[0, head] @ cache["k"][page, i, head]) * 10 * 0.7 / 1.5) for i in range(2)]
        assert lse[0, head] == pytest.approx(math.log(sum(map(math.exp, capped))), rel=1e-12)


def test_sinks_take_their_share_and_nothing_else() -> None:
    problem, q, cache, step, _ = run(((1, 9),), {"sinks": True})
    without, lse = attend(replace(problem, sinks=False, return_lse=True), q, cache, step)
    sinks = np.array([0.0, 3.0, -np.inf, 800.0])
    share = 1 / (1 + np.exp(np.minimum(sinks - lse[0], 700)))
    np.testing.assert_allclose(attend(problem, q, cache, step, sinks=sinks)[0], without[0] * share[:, None], atol=1e-12)


def test_lse_with_sinks_is_refused() -> None:
    problem, q, cache, step, _ = run(((1, 9),), {"sinks": True, "return_lse": True})
    with pytest.raises(ContractViolation, match="merge_states"):
        attend(problem, q, cache, step, sinks=np.zeros(4))


def test_attention_over_two_halves_merges_to_the_whole_with_sinks_once() -> None:
    problem, q, cache, step, _ = run(((2, 30), (1, 0)), {"sinks": True}, page_size=16, padding=1)
    sinks = np.linspace(-1, 2, 4)
    whole = attend(problem, q, cache, step, sinks=sinks)
    split = replace(problem, sinks=False, return_lse=True, key_ranges=True)
    parts = [
        attend(split, q, cache, step, key_ranges=np.tile(np.array([bounds], np.int32), (4, 1)))
        for bounds in ((0, 11), (11, 29), (29, 30))
    ]
    out, lse = np.stack([p[0] for p in parts]), np.stack([p[1] for p in parts])
    merge = MergeProblem(dtype="float64", parts=3, rows=4, heads=4, v_dim=16, sinks=True)
    np.testing.assert_allclose(merge_states(merge, out, lse, sinks=sinks), whole, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("sinks", [None, np.array([5.0, -5.0])])
def test_merging_only_empty_parts_gives_zero_even_from_garbage(sinks: HostArray | None) -> None:
    out = np.full((3, 1, 2, 4), np.nan)
    lse = np.full((3, 1, 2), -np.inf)
    problem = MergeProblem(dtype="float64", parts=3, rows=1, heads=2, v_dim=4, sinks=sinks is not None)
    assert np.all(merge_states(problem, out, lse, sinks=sinks) == 0)


def test_latent_attention_is_ordinary_attention_over_decompressed_keys_and_values() -> None:
    for case in all_ops()["latent_attend"].cases(np.random.default_rng(3), "full"):
        if case.problem.dtype == "float64":
            check_decompressed(case)


def check_decompressed(case: Case) -> None:
    p: Any = case.problem
    q_nope, q_rope, cache, w_uk, w_uv, step = (operand(arg, p) for arg in case.args)
    got = latent_attend(p, q_nope, q_rope, cache, w_uk, w_uv, step)
    latent, rope = cache["k"][:, :, 0, : p.v_dim], cache["k"][:, :, 0, p.v_dim :]
    with np.errstate(invalid="ignore"):
        nope = np.einsum("npl,hld->nphd", latent, w_uk)
        keys = np.concatenate([nope, np.repeat(rope[:, :, None], p.q_heads, 2)], -1)
        values = np.einsum("npl,hvl->nphv", latent, w_uv)
    plain = replace(
        p, kv_heads=p.q_heads, qk_dim=keys.shape[-1], v_dim=values.shape[-1], value_in_key=False
    )  # fmt: skip
    expected = attend(plain, np.concatenate([q_nope, q_rope], -1), {"k": keys, "v": values}, step)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)
