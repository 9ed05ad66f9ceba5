"""Experts beyond the cases of the contract: tiles of any distribution of rows, sorts of many assignments, and routing
of numbers that are none."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import WeightArg
from lineshaft_contract.problems import ExpertProblem, RouterProblem
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_triton.interpreting import compiling
from lineshaft_triton.kernels import moe, triton_kernels
from lineshaft_triton.kernels.experts import Grouped
from lineshaft_triton.launch import Config
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import TARGETS

SPECS = all_ops()
SESSION = SimpleNamespace(recorder=None)


@pytest.fixture
def real_tiles() -> Iterator[None]:
    """Kernels take the tiles of their target, not those of the interpreter."""
    with compiling():
        yield


def taking(target: str, op: str, problem: Any) -> Kernel:
    """The one kernel of this kit that takes a problem."""
    found = [k for k in triton_kernels("gpu", TARGETS[target]) if k.op == op and k.supports(problem) is None]
    assert [kernel.priority for kernel in found] == [TRITON] and problem.features() <= found[0].handles
    return found[0]


def assert_right(op: str, case: Case, target: str = "sm90") -> None:
    """The kernel that takes the case is within the op's tolerance."""
    args = [from_host(a) if isinstance(a := operand(v, case.problem), np.ndarray) else a for v in case.args]
    kwargs = {name: from_host(operand(value, case.problem)) for name, value in case.kwargs.items()}
    found = taking(target, op, case.problem).bind(case.problem, SESSION)(*args, **kwargs)
    hosts = tuple(map(to_host, found)) if isinstance(found, tuple) else to_host(found)
    assert not compare(SPECS[op], case, hosts)


# ---- grouped products ------------------------------------------------------------------------------------------


def grouped_case(counts: list[int], tail: int, dtype: str = "bfloat16", **fields: Any) -> Case:
    """Experts with so many rows each, then rows of none, which are NaN."""
    rng, rows = np.random.default_rng(len(counts)), sum(counts) + tail
    given: dict[str, Any] = {"hidden": 48, "width": 40, "activation": "silu", **fields}
    problem = ExpertProblem(dtype=dtype, experts=len(counts), local=len(counts), k=1, rows=rows, **given)
    x = rng.standard_normal((rows, problem.hidden))
    x[sum(counts) :] = np.nan
    w13 = rng.standard_normal((problem.local, 2 * problem.width, problem.hidden)) / problem.hidden**0.5
    w2 = rng.standard_normal((problem.local, problem.hidden, problem.width)) / problem.width**0.5
    biases = {"w13_bias": 2 * problem.width, "w2_bias": problem.hidden} if problem.bias else {}
    kwargs = {name: rng.standard_normal((problem.local, width)) for name, width in biases.items()}
    offsets = np.cumsum([0, *counts]).astype(np.int32)
    return Case("random", problem, (x, WeightArg(w13, "experts"), WeightArg(w2, "experts"), offsets), kwargs)


LOADS = [
    [0, 37, 0, 1, 16, 0], [0, 0, 61, 0], [0] * 5, [5], [1] * 20, [150, 0, 170], [0, 400],
]  # fmt: skip


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("target", ["sm90", "gfx942", "gfx1100"])
@pytest.mark.parametrize("counts", LOADS, ids=str)
def test_empty_and_overloaded_experts(counts: list[int], target: str) -> None:
    """With a target's own tiles, of 16, 64 and 128 rows as the experts' average has it."""
    assert_right("grouped_mlp", grouped_case(counts, tail=5), target)


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("activation", ["gelu", "swigluoai"])
@pytest.mark.parametrize("size", [40, 37])
def test_activations_with_biases(activation: str, size: int) -> None:
    """Also of rows that do not begin at whole vectors, and of float32."""
    limits = {"swiglu_alpha": 1.702, "swiglu_limit": 0.9} if activation == "swigluoai" else {}
    for dtype in ("bfloat16", "float32"):
        fields: dict[str, Any] = {"activation": activation, "bias": True, "width": size, **limits}
        assert_right("grouped_mlp", grouped_case([0, 21, 4], tail=2, dtype=dtype, **fields))


def test_nan_reaches_the_rows_that_hold_it_and_no_other() -> None:
    limits: dict[str, Any] = {"activation": "swigluoai", "swiglu_alpha": 1.702, "swiglu_limit": 0.9}
    case = grouped_case([3, 4], tail=0, **limits)
    case.args[0][1] = np.nan
    args = [from_host(operand(value, case.problem)) for value in case.args]
    found = taking("sm90", "grouped_mlp", case.problem).bind(case.problem, SESSION)(*args)
    assert found.isnan().all(1).tolist() == [row == 1 for row in range(7)]


@pytest.mark.parametrize("local", [1, 7, 100, 512])
def test_tiles_cover_every_row_once_and_each_has_one_expert(local: int) -> None:
    """Whatever the distribution, and within the tiles that the grid has: those of the rows of nobody among them."""
    for seed in range(6):
        rng = np.random.default_rng([local, seed])
        rows, height = int(rng.integers(1, 2000)), int(rng.choice([16, 64, 128]))
        shares = rng.dirichlet(np.full(local + 1, rng.choice([0.02, 1.0, 100.0])))
        counts = rng.multinomial(rows, shares)
        offsets = np.cumsum([0, *counts[:local]]).astype(np.int32)
        problem = ExpertProblem(dtype="bfloat16", experts=local, local=local, hidden=8, width=8, k=1, rows=rows)
        config = Config({"BLOCK_M": height})
        grouped = Grouped(SESSION, problem, config, config, ("", ""))
        table = to_host(grouped.table(from_host(offsets)))
        owner, ends = np.full(rows, -1), [*offsets[1:], rows]
        for expert, first, last in table[: grouped.tiles]:
            if expert >= 0:
                own = slice(first, min(first + height, last))
                assert last == ends[expert] and own.start < own.stop and (owner[own] == -1).all()
                owner[own] = expert
        assert np.array_equal(owner, np.repeat(np.arange(local + 1), counts)), (seed, rows, height)
        assert (table[grouped.tiles :, 0] == -1).all()


@pytest.mark.parametrize("target", TARGETS)
def test_one_kernel_takes_a_grouped_product(target: str) -> None:
    for rows in (1, 8, 128, 129, 512, 513, 100_000):
        for dtype in ("bfloat16", "float16", "float32"):
            problem = ExpertProblem(dtype=dtype, experts=8, local=2, hidden=64, width=64, k=1, rows=rows)
            assert taking(target, "grouped_mlp", problem).tunable


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "float64"}, "accumulates in float32"), ({"activation": "relu"}, "knows the activations"),
        ({"local": 513, "experts": 513}, "512 experts of a rank at most, not 513"), ({"rows": 2000}, "0 rows to 16"),
    ],
)  # fmt: skip
def test_reasons(fields: dict[str, Any], reason: str) -> None:
    sizes: dict[str, Any] = {"dtype": "bfloat16", "experts": 8, "local": 8, "hidden": 64, "width": 64, "rows": 8}
    few = next(k for k in triton_kernels("gpu", TARGETS["sm90"]) if k.name == "triton_grouped_mlp_few")
    assert reason in (few.supports(ExpertProblem(**{**sizes, **fields})) or "")


# ---- ways to experts and back ----------------------------------------------------------------------------------


def moe_problem(tokens: int, k: int, experts: int, local: int, hidden: int = 8) -> ExpertProblem:
    return ExpertProblem(dtype="float32", experts=experts, local=local, hidden=hidden, width=0, k=k, rows=tokens)


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("skewed", [False, True])
def test_sorts_longer_than_a_program_reads_at_once(skewed: bool) -> None:
    """More assignments than a chunk, with half of the experts elsewhere and, skewed, nearly all at one."""
    rng, tokens, k, total = np.random.default_rng(3), 700, 4, 24
    mapping = np.full(total, -1, np.int32)
    mapping[rng.permutation(total)[: total // 2]] = rng.permutation(total // 2)
    weights = np.where(np.arange(total) == np.flatnonzero(mapping >= 0)[0], 1e4 if skewed else 1.0, 1.0)
    ids = rng.choice(total, (tokens, k), p=weights / weights.sum()).astype(np.int32)
    assert tokens * k > 2 * moe.CHUNK
    problem = moe_problem(tokens, k, total, total // 2)
    assert_right("moe_dispatch", Case("random", problem, (rng.standard_normal((tokens, 8)), ids, mapping, total // 2)))


@pytest.mark.usefixtures("real_tiles")
def test_rows_wider_than_a_program_moves() -> None:
    rng, problem = np.random.default_rng(4), moe_problem(3, 2, 4, 4, hidden=1500)
    ids = rng.integers(0, 4, (3, 2)).astype(np.int32)
    x = rng.standard_normal((3, 1500))
    assert_right("moe_dispatch", Case("random", problem, (x, ids, np.arange(4, dtype=np.int32), 4)))
    rows, source = rng.standard_normal((6, 1500)), rng.permutation(6).astype(np.int32)
    probs = rng.dirichlet(np.ones(2), 3).astype(np.float32)
    assert_right("moe_combine", Case("random", problem, (rows, source, probs)))


def test_a_step_of_zeros_is_combined() -> None:
    """Its source names one row alone; what is read then is some row, and not beyond them."""
    problem = moe_problem(4, 3, 4, 4)
    kernel = taking("sm90", "moe_combine", problem).bind(problem, SESSION)
    zeros = torch.zeros(12, dtype=torch.int32)
    assert kernel(torch.ones(12, 8), zeros, torch.zeros(4, 3)).tolist() == torch.zeros(4, 8).tolist()


# ---- routing ---------------------------------------------------------------------------------------------------


def logits(experts: int) -> Any:
    """f32[10, experts] with ties of all kinds, -0 beside 0, infinities and NaN."""
    rng = np.random.default_rng(experts)
    x = rng.integers(-3, 4, (10, experts)) / 2.0
    x[1] = np.where(np.arange(experts) % 2, 0.0, -0.0)
    x[2, ::3] = np.nan
    x[3] = np.nan
    x[4, 1::2] = -np.inf
    x[5, experts // 2] = np.inf
    x[6, :2] = [np.nan, np.inf][:experts]
    x[7] = -np.inf
    x[8, : experts - 1] = np.nan
    return x.astype(np.float32)


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (6, 6), (100, 7), (512, 10)])
@pytest.mark.parametrize("softmax", ["before", "after"])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_odd_logits_are_ordered_as_the_reference_orders_them(experts: int, k: int, softmax: str, groups: int) -> None:
    groups = groups if experts % 2 == 0 else 0
    k = min(k, experts // 2) if groups else k
    problem = RouterProblem(
        dtype="float32", experts=experts, k=k, rows=10, softmax=softmax, groups=groups, group_top=1, renormalise=True
    )  # fmt: skip
    x = logits(experts)
    expected, weights = SPECS["router_topk"].reference(problem, x)
    ids, probs = taking("sm90", "router_topk", problem).bind(problem, SESSION)(from_host(x))
    assert np.array_equal(to_host(ids), expected)
    assert np.allclose(to_host(probs), weights, rtol=1e-5, equal_nan=True)


def test_no_more_experts_than_a_program_holds() -> None:
    router = next(k for k in triton_kernels("gpu", TARGETS["sm90"]) if k.name == "triton_router_topk")
    assert router.supports(RouterProblem(dtype="bfloat16", experts=512, k=8)) is None
    assert "at most 1024 experts, not 2048" in (
        router.supports(RouterProblem(dtype="float32", experts=2048, k=8)) or ""
    )
    assert router.supports(RouterProblem(dtype="float64", experts=8, k=2))


def test_no_token_at_all() -> None:
    problem = moe_problem(0, 2, 4, 4)
    case = Case("none", problem, (np.zeros((0, 8)), np.zeros((0, 2), np.int32), np.arange(4, dtype=np.int32), 4))
    assert_right("moe_dispatch", case)
