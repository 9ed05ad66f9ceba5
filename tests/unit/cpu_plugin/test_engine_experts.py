"""Heads and experts of the native engine: on several threads and every level, with padding tokens that hold garbage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.unit.cpu_plugin.taped import LEVELS, Live, Packed, close, held, kernel, run

from lineshaft_contract.ops import experts as rules
from lineshaft_contract.ops.linear import head_linear
from lineshaft_contract.ops.spec import EXACT, HostArray, Numerics
from lineshaft_contract.problems import ExpertProblem, LinearProblem, RouterProblem
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_cpu import native
from lineshaft_cpu.engine.kernels.experts import pack_stack
from lineshaft_cpu.engine.session import NativeSession
from lineshaft_cpu.engine.tape import Tape

BF16: Any = ml_dtypes.bfloat16
DTYPES = [np.float32, BF16]
GARBAGE = 10**9
"""An id that padding tokens hold: whoever looks it up crashes."""


def numerics(dtype: Any) -> Numerics:
    return Numerics("float32", np.dtype(dtype).name)


# ---- head_linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "live"), [(1, 1), (9, 7), (300, 290)])
def test_heads_are_multiplied_apart(level: str, dtype: Any, tokens: int, live: int) -> None:
    rng = np.random.default_rng(0)
    heads, n, k = 5, 70, 96
    x = rng.standard_normal((tokens, heads, k)).astype(dtype)
    w = (rng.standard_normal((heads, n, k)) / k**0.5).astype(dtype)
    problem = LinearProblem(dtype=x.dtype.name, m=tokens, n=n, k=k, heads=heads)
    got = run("cpu_head_linear", problem, Live(x, live), Packed(w, "linear"), level=level)[0][:live]
    exact, reference = (head_linear(problem, x[:live], w, num=num) for num in (EXACT, numerics(dtype)))
    close(got, exact, reference)


# ---- router_topk ---------------------------------------------------------------------------------------------------

ROUTERS = [
    RouterProblem(dtype="float32", experts=8, k=8), RouterProblem(dtype="float32", experts=131, k=9, renormalise=True),
    RouterProblem(dtype="float32", experts=64, k=6, softmax="after", scale=2.5),
    RouterProblem(dtype="float32", experts=160, k=6, groups=8, group_top=3, scale=16.0),
]  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", ROUTERS)
def test_a_router_chooses_as_the_reference_does(level: str, dtype: Any, problem: RouterProblem) -> None:
    x = (np.random.default_rng(1).standard_normal((200, problem.experts)) * 3).astype(dtype)
    x[:20] = np.round(x[:20].astype(np.float32))  # ties
    problem = replace(problem, dtype=x.dtype.name, rows=200)
    ids, probs = run("cpu_router_topk", problem, Live(x, 190), level=level)
    wanted_ids, wanted = rules.router_topk(problem, x[:190].astype(np.float64))
    assert np.array_equal(ids[:190], wanted_ids)
    np.testing.assert_allclose(probs[:190], wanted, rtol=3e-6)


def test_a_router_names_experts_that_there_are_whatever_the_logits() -> None:
    x = np.full((3, 40), np.nan, np.float32)
    x[1, 5:] = -np.inf
    x[2, ::2] = np.inf
    ids, _ = run("cpu_router_topk", RouterProblem(dtype="float32", experts=40, k=6, rows=3, groups=5, group_top=2), x)
    assert ((ids >= 0) & (ids < 40)).all()
    assert all(len(set(row)) == 6 for row in ids.tolist())


# ---- experts -------------------------------------------------------------------------------------------------------

MAPPINGS = {"all": list(range(6)), "some": [-1, 1, 0, -1, 2, -1], "one": [-1, -1, -1, 0, -1, -1]}


def routed(mapping: str, tokens: int, k: int, hidden: int, dtype: Any) -> tuple[ExpertProblem, list[HostArray]]:
    """A problem, and x, ids, probs, expert_map."""
    rng = np.random.default_rng(2)
    chosen = np.stack([rng.permutation(6)[:k] for _ in range(tokens)]).astype(np.int32)
    probs = rng.dirichlet(np.ones(k), tokens).astype(np.float32)
    x = rng.standard_normal((tokens, hidden)).astype(dtype)
    table = np.array(MAPPINGS[mapping], np.int32)
    local = int(table.max()) + 1
    problem = ExpertProblem(dtype=x.dtype.name, experts=6, local=local, hidden=hidden, width=0, k=k, rows=tokens)
    return problem, [x, chosen, probs, table]


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("k", [1, 3])
def test_padding_tokens_are_dispatched_behind_all_others(mapping: str, k: int) -> None:
    problem, (x, ids, _, table) = routed(mapping, 70, k, 33, np.float32)
    ids[50:] = GARBAGE
    got, offsets, source = run("cpu_moe_dispatch", problem, Live(x, 50), Live(ids, 50), table, problem.local)
    rows, wanted_offsets, wanted_source = rules.moe_dispatch(problem, x[:50], ids[:50], table, problem.local)
    end = int(offsets[-1])
    assert np.array_equal(offsets, wanted_offsets)
    assert np.array_equal(source[:end], wanted_source[:end])
    assert np.array_equal(got[:end], rows[:end])
    assert not got[end:].any()
    assert sorted(source) == list(range(70 * k))


@pytest.mark.parametrize("name", ["cpu_moe_dispatch", "cpu_reference_moe_dispatch"])
def test_sorted_rows_are_not_those_of_tokens_though_as_many(name: str) -> None:
    problem, (x, ids, _, table) = routed("all", 10, 1, 33, np.float32)
    session = NativeSession(native.load(LEVELS[0]), 1)
    live = held(np.array([4], np.int32))
    with session.recording(Tape()):
        bound = kernel(name, LEVELS[0]).bind(problem, session)
        made = bound(held(x, live), held(ids, live), held(table), problem.local)
    session.close()
    assert [array.live for array in made] == [None] * 3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_combined_for_live_tokens(level: str, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    tokens, k, hidden = 70, 4, 45
    source = rng.permutation(tokens * k).astype(np.int32)
    probs = rng.dirichlet(np.ones(k), tokens).astype(np.float32)
    rows = rng.standard_normal((tokens * k, hidden)).astype(dtype)
    problem = ExpertProblem(dtype=rows.dtype.name, experts=0, local=0, hidden=hidden, width=0, k=k, rows=tokens)
    exact, reference = (
        rules.moe_combine(problem, rows, source, probs, num=num)[:60] for num in (EXACT, numerics(dtype))
    )
    probs[60:] = np.nan
    got = run("cpu_moe_combine", problem, rows, source, Live(probs, 60), level=level)[0]
    close(got[:60], exact, reference)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai"])
@pytest.mark.parametrize("bias", [False, True])
def test_each_expert_takes_its_rows(level: str, dtype: Any, activation: str, bias: bool) -> None:
    """Experts without rows, with one, with more than a block of them; a width that ends within a panel."""
    rng = np.random.default_rng(4)
    hidden, width, counts = 64, 80, [0, 1, 290, 0, 14, 0]
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    numbers: dict[str, Any] = {"swiglu_alpha": 1.702, "swiglu_limit": 0.8} if activation == "swigluoai" else {}
    problem = ExpertProblem(
        dtype=np.dtype(dtype).name, experts=6, local=6, hidden=hidden, width=width, k=1, rows=400, bias=bias,
        activation=activation, **numbers,
    )  # fmt: skip
    x = rng.standard_normal((400, hidden)).astype(dtype)
    x[offsets[-1] :] = np.nan
    w13 = (rng.standard_normal((6, 2 * width, hidden)) / hidden**0.5).astype(dtype)
    w2 = (rng.standard_normal((6, hidden, width)) / width**0.5).astype(dtype)
    sizes = {"w13_bias": 2 * width, "w2_bias": hidden} if bias else {}
    biases: dict[str, Any] = {name: rng.standard_normal((6, size)).astype(dtype) for name, size in sizes.items()}
    got = run(
        "cpu_grouped_mlp", problem, x, Packed(w13, "experts"), Packed(w2, "experts"), offsets, level=level, **biases
    )[0]  # fmt: skip
    exact, reference = (
        rules.grouped_mlp(problem, x, w13, w2, offsets, num=num, **biases) for num in (EXACT, numerics(dtype))
    )
    close(got, exact, reference)
    assert not got[offsets[-1] :].any()


def test_no_token_for_any_expert_gives_zeros() -> None:
    problem = ExpertProblem(dtype="float32", experts=2, local=2, hidden=32, width=32, k=1, rows=70)
    x, w = np.full((70, 32), np.nan, np.float32), np.ones((2, 64, 32), np.float32)
    packed = Packed(w, "experts"), Packed(np.ascontiguousarray(w[:, :32]), "experts")
    assert not run("cpu_grouped_mlp", problem, x, *packed, np.zeros(3, np.int32))[0].any()


def test_a_stack_is_packed_alike_however_it_was_stored() -> None:
    rng = np.random.default_rng(5)
    problem = ExpertProblem(dtype="bfloat16", experts=3, local=3, hidden=6, width=5)
    stack = rng.standard_normal((3, 10, 6)).astype(BF16)
    param = Param("w13", "w13", stack.shape, "bfloat16", {"experts": problem}, lambda checkpoint, at: Local(()))

    def packed(*parts: HostArray) -> HostArray:
        return pack_stack(param, Local(tuple(Stored("none", part.shape, {"data": part}) for part in parts)))["data"]

    whole = packed(stack)
    assert whole.shape == (3, 2, 1, 3, 32, 2)
    assert np.array_equal(whole[1, 1, 0, :, 2].reshape(6), stack[1, 7])
    assert np.array_equal(packed(*stack), whole)
    assert np.array_equal(packed(*(half for matrix in stack for half in (matrix[:5], matrix[5:]))), whole)
