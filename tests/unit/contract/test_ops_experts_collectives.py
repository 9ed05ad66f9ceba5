"""The references of routing, expert MLPs and collectives against plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    permute,
    reduce_scatter,
)
from lineshaft_contract.ops.experts import expert_mlp, moe_combine, moe_dispatch, router_topk
from lineshaft_contract.ops.run import operand
from lineshaft_contract.problems import CollectiveProblem, ExpertProblem, RouterProblem


def route(logits: Any, **fields: Any) -> tuple[list[list[int]], Any]:
    rows = np.atleast_2d(np.asarray(logits, float))
    ids, probs = router_topk(RouterProblem(dtype="float64", experts=rows.shape[1], **fields), rows)
    return ids.tolist(), probs


LOGITS = [0.5, 2.0, 1.0, 2.0, -1.0, 0.0]


def test_router_orders_by_probability_and_breaks_ties_by_index() -> None:
    weights = np.exp(LOGITS) / np.exp(LOGITS).sum()
    ids, probs = route(LOGITS, k=3)
    assert ids == [[1, 3, 2]]
    np.testing.assert_allclose(probs[0], weights[[1, 3, 2]], rtol=1e-12)


def test_router_softmax_after_renormalise_and_scale() -> None:
    chosen = np.exp([2.0, 2.0, 1.0])
    np.testing.assert_allclose(route(LOGITS, k=3, softmax="after")[1][0], chosen / chosen.sum(), rtol=1e-12)
    renormalised = route(LOGITS, k=3, renormalise=True, scale=2.5)[1]
    np.testing.assert_allclose(renormalised[0], 2.5 * chosen / chosen.sum(), rtol=1e-12)


def test_router_chooses_within_the_best_groups() -> None:
    assert route([9.0, -5.0, 1.0, 2.0, 8.0, 7.0], k=3, groups=3, group_top=2)[0] == [[0, 4, 5]]
    assert route([9.0, -5.0, 1.0, 2.0, 8.0, 7.0], k=2, groups=3, group_top=1)[0] == [[0, 1]]


def naive_mlp(
    p: Any, x: Any, ids: Any, probs: Any, w13: Any, w2: Any, expert_map: Any, w13_bias: Any = None, w2_bias: Any = None
) -> Any:
    out = np.zeros(x.shape)
    first = np.zeros(w13.shape[:2]) if w13_bias is None else w13_bias
    second = np.zeros(w2.shape[:2]) if w2_bias is None else w2_bias
    for t in range(len(x)):
        for expert, prob in zip(ids[t], probs[t], strict=True):
            local = int(expert_map[expert])
            if local >= 0:
                gate, up = np.split(w13[local] @ x[t] + first[local], 2)
                if p.activation == "silu":
                    hidden = gate / (1 + np.exp(-gate)) * up
                elif p.activation == "swigluoai":
                    gate, up = np.minimum(gate, p.swiglu_limit), np.clip(up, -p.swiglu_limit, p.swiglu_limit)
                    hidden = (up + 1) * gate / (1 + np.exp(-p.swiglu_alpha * gate))
                else:
                    hidden = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
                out[t] += prob * (w2[local] @ hidden + second[local])
    return out


MLP_CASES = [c for c in all_ops()["expert_mlp"].cases(np.random.default_rng(1), "full") if c.problem.dtype == "float64"]


@pytest.mark.parametrize("case", MLP_CASES, ids=lambda case: case.id)
def test_expert_mlp_is_a_loop_over_tokens_and_experts(case: Any) -> None:
    args = [operand(arg, case.problem) for arg in case.args]
    expected = naive_mlp(case.problem, *args, **case.kwargs)
    np.testing.assert_allclose(expert_mlp(case.problem, *args, **case.kwargs), expected, rtol=1e-11, atol=1e-13)
    assert expected.any() != case.id.startswith("none_chosen")


def test_partial_sums_of_all_ranks_make_the_whole() -> None:
    rng = np.random.default_rng(0)
    x, w13, w2 = rng.standard_normal((6, 4)), rng.standard_normal((4, 6, 4)), rng.standard_normal((4, 4, 3))
    ids = np.stack([rng.permutation(4)[:2] for _ in range(6)]).astype(np.int32)
    probs = rng.dirichlet(np.ones(2), 6)

    def rank(first: int, stop: int) -> Any:
        mapping = np.array([e - first if first <= e < stop else -1 for e in range(4)], np.int32)
        problem = ExpertProblem(dtype="float64", experts=4, local=stop - first, hidden=4, width=3)
        return expert_mlp(problem, x, ids, probs, w13[first:stop], w2[first:stop], mapping)

    np.testing.assert_allclose(rank(0, 1) + rank(1, 4), rank(0, 4), rtol=1e-12, atol=1e-14)


def test_dispatch_loses_nothing_when_every_token_wants_the_same_expert() -> None:
    problem = ExpertProblem(dtype="float64", experts=3, local=3, hidden=2, width=1)
    x, ids = np.arange(8.0).reshape(4, 2) + 1, np.tile(np.array([[2, 2]], np.int32), (4, 1))
    rows, offsets, source = moe_dispatch(problem, x, ids, np.arange(3, dtype=np.int32), 3)
    assert offsets.tolist() == [0, 0, 0, 8] and source.tolist() == list(range(8))
    np.testing.assert_array_equal(moe_combine(problem, rows, source, np.full((4, 2), 0.5)), x)


def test_rows_for_experts_elsewhere_are_zero_and_last() -> None:
    problem = ExpertProblem(dtype="float64", experts=2, local=1, hidden=1, width=1)
    x, ids = np.array([[5.0], [7.0]]), np.array([[0, 1], [1, 0]], np.int32)
    rows, offsets, source = moe_dispatch(problem, x, ids, np.array([-1, 0], np.int32), 1)
    assert rows[:, 0].tolist() == [5.0, 7.0, 0.0, 0.0]
    assert offsets.tolist() == [0, 2] and source.tolist() == [1, 2, 0, 3]


# ---- collectives --------------------------------------------------------------------------------------------------

P3 = CollectiveProblem(dtype="float64", axis=("tp",), size=3, shape=(3, 6))
XS = [np.arange(18.0).reshape(3, 6) + 100 * m for m in range(3)]


def test_all_reduce_and_reduce_scatter_sum_over_members() -> None:
    total = XS[0] + XS[1] + XS[2]
    for got in all_reduce(P3, XS, "tp"):
        np.testing.assert_array_equal(got, total)
    for m, got in enumerate(reduce_scatter(P3, XS, "tp", 1)):
        np.testing.assert_array_equal(got, total[:, 2 * m : 2 * m + 2])


def test_all_gather_undoes_a_split() -> None:
    for dim in (0, 1):
        tiles = np.split(XS[0], 3, axis=dim)
        assert all(np.array_equal(got, XS[0]) for got in all_gather(P3, tiles, "tp", dim))


def test_all_to_all_exchanges_tiles_and_is_its_own_inverse_with_dims_swapped() -> None:
    there = all_to_all(P3, XS, "tp", 1, 0)
    for m, got in enumerate(there):
        assert got.shape == (9, 2)
        for other in range(3):
            np.testing.assert_array_equal(got[3 * other : 3 * other + 3], XS[other][:, 2 * m : 2 * m + 2])
    for back, x in zip(all_to_all(P3, there, "tp", 0, 1), XS, strict=True):
        np.testing.assert_array_equal(back, x)


def test_broadcast_and_permute() -> None:
    assert all(np.array_equal(got, XS[2]) for got in broadcast(P3, XS, "tp", 2))
    for m, got in enumerate(permute(P3, XS, "tp", 1)):
        np.testing.assert_array_equal(got, XS[(m - 1) % 3])
    for m, got in enumerate(permute(P3, XS, "tp", -1)):
        np.testing.assert_array_equal(got, XS[(m + 1) % 3])


def test_results_are_fresh() -> None:
    for got in (*all_reduce(P3, XS, "tp"), *broadcast(P3, XS, "tp", 0), *permute(P3, XS, "tp", 0)):
        assert not any(np.shares_memory(got, x) for x in XS)
