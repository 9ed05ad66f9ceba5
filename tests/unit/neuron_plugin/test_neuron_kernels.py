"""The kernels of the Neuron plugin on every smoke case of their ops, and what programs of the device must not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.attention import attend_problem
from lineshaft_contract.ops.cache import make_cache
from lineshaft_contract.ops.cases import Paging, paged_step
from lineshaft_contract.ops.logits import kept_tokens
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import CacheArg, StepArg, WeightArg
from lineshaft_contract.packing import weight_packing
from lineshaft_contract.problems import ExpertProblem, SampleProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Local, Param, Stored, Weight
from lineshaft_neuron.kernels import NEURON, experts, neuron_kernels, ranking
from lineshaft_neuron.kernels import attend as attention
from lineshaft_neuron.kernels import logits as sampling
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.pages import page_view
from lineshaft_torch.session import TorchSession
from lineshaft_torch.tensors import map_tensors, tensors_in

OPS = {name: spec for name, spec in all_ops().items() if not spec.collective}
OWN = {kernel.op: kernel for kernel in neuron_kernels("neuron")}
OTHERS = [kernel for kernel in portable_kernels("neuron") if kernel.op in OPS and kernel.op not in OWN]
BY_ID = {kernel.name: kernel for kernel in [*OWN.values(), *OTHERS]}


class StaticProgram(TorchDispatchMode):
    """Refuses what a program of the device cannot hold: float64, arithmetic in int64, an order or a shape that values
    decide, and values read on the host. int64 may only be converted to, rearranged, and index."""

    DYNAMIC = frozenset(
        {"sort", "argsort", "searchsorted", "nonzero", "_local_scalar_dense", "masked_select", "unique"}
    )
    INDEXING = frozenset({
        "index_copy_", "index_copy", "gather", "scatter", "scatter_", "index_select", "topk", "_to_copy", "view",
        "expand", "unsqueeze", "_unsafe_view", "slice", "clone", "select", "detach",
    })  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        given = tensors_in([args, list((kwargs or {}).values())])
        dtypes = {tensor.dtype for tensor in [*given, *tensors_in(out)]}
        if name in self.DYNAMIC or (name == "index" and any(t.dtype == torch.bool for t in tensors_in(args[1]))):
            raise AssertionError(f"{name} depends on data")
        if torch.float64 in dtypes or (torch.int64 in dtypes and name not in self.INDEXING):
            raise AssertionError(f"{name} of {sorted(map(str, dtypes))}")
        return out


@pytest.fixture(scope="module")
def session() -> Iterator[TorchSession]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = TorchSession("cpu")
    yield made
    made.close()
    torch.set_num_threads(before)


@pytest.fixture(params=BY_ID.values(), ids=BY_ID)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


@cache
def cases_of(op: str) -> tuple[Case, ...]:
    return tuple(OPS[op].cases(np.random.default_rng(2024), "smoke"))


def as_float16(case: Case) -> Case:
    problem: Any = case.problem
    return replace(case, problem=replace(problem, **{
        name: "float16" for name in ("dtype", "kv_dtype") if getattr(problem, name, "") == "bfloat16"
    }))  # fmt: skip


def takes(kernel: Kernel, case: Case) -> bool:
    return not case.problem.features() - kernel.handles and kernel.supports(case.problem) is None


def tensor(array: Any) -> Any:
    return from_host(array.copy()) if isinstance(array, np.ndarray) else array


def weight(value: WeightArg, case: Case) -> Weight:
    host, problems = operand(value, case.problem), {value.kind: case.problem}
    param = Param("w", "w", host.shape, case.problem.dtype, problems, lambda checkpoint, at: Local(()))
    if param.scheme == "none":
        return Weight(0, "w", problems, "dense", {"data": tensor(host)})
    packing = weight_packing(param.scheme)
    assert packing.pack is not None
    leaves = packing.pack(param, Local((Stored("none", host.shape, {"data": host}),)))
    return Weight(0, "w", problems, packing.layout, {name: tensor(leaf) for name, leaf in leaves.items()})


def argument(value: Any, case: Case, first: bool) -> Any:
    """A case's argument as a kernel takes it; the first pages are the cache, others plain arrays."""
    if isinstance(value, WeightArg):
        return weight(value, case)
    if isinstance(value, StepArg):
        return StepInputs({name: tensor(array) for name, array in value.arrays.items()}, value.shape)
    host = operand(value, case.problem)
    if isinstance(value, CacheArg) and first:
        return Cache(0, case.problem, "slots", {n: tensor(a).flatten(0, 1).contiguous() for n, a in host.items()})
    if isinstance(host, Mapping):
        return {name: tensor(array) for name, array in host.items()}
    return [tensor(item) for item in host] if isinstance(host, list) else tensor(host)


def arguments(case: Case) -> tuple[list[Any], dict[str, Any]]:
    pages = [isinstance(value, CacheArg) for value in case.args]
    cache_at = pages.index(True) if any(pages) else -1
    args = [argument(value, case, i == cache_at) for i, value in enumerate(case.args)]
    return args, {name: argument(value, case, False) for name, value in case.kwargs.items()}


def host_result(result: Any, case: Case) -> Any:
    if isinstance(result, Cache):
        return {name: to_host(array) for name, array in page_view(replace(result, problem=case.problem)).items()}
    if isinstance(result, tuple):
        return tuple(host_result(item, case) for item in result)
    return map_tensors(to_host, result)


@torch.no_grad()
def wrong_in(kernel: Kernel, case: Case, session: Any) -> list[str]:
    args, kwargs = arguments(case)
    bound = kernel.bind(case.problem, session)
    with StaticProgram():
        result = bound(*args, **kwargs)
    loose = [tuple(tensor.shape) for tensor in tensors_in(result) if not tensor.is_contiguous()]
    assert not loose, f"{kernel.name} {case.id}: results {loose} are not contiguous"
    return compare(OPS[kernel.op], case, host_result(result, case))


def test_kernels_hold_to_static_programs_and_are_within_tolerance(kernel: Kernel, session: Any) -> None:
    taken = [case for case in cases_of(kernel.op) if takes(kernel, case)]
    assert taken, f"{kernel.name} takes no case of {kernel.op}"
    wrong = [sentence for case in taken for sentence in wrong_in(kernel, case, session)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", OWN)
def test_own_kernels_compute_in_float16_too(op: str, session: Any) -> None:
    narrow = [
        as_float16(case) for case in cases_of(op) if case.problem.dtype == "bfloat16" and "extreme" not in case.id
    ]
    taken = [case for case in narrow if takes(OWN[op], case)]
    assert taken
    wrong = [sentence for case in taken for sentence in wrong_in(OWN[op], case, session)]
    assert not wrong, "\n".join(wrong)


@torch.no_grad()
@pytest.mark.parametrize("op", OWN)
def test_own_kernels_take_rows_with_a_stride(op: str, session: Any) -> None:
    def strided(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            return value
        rows = value.flatten(1)
        wide = torch.zeros((rows.shape[0], rows.shape[1] + 8), dtype=torch.int32).to(value.dtype)
        wide[:, 4:-4] = rows
        return wide[:, 4:-4].unflatten(1, value.shape[1:])

    wrong: list[str] = []
    for case in cases_of(op):
        if takes(OWN[op], case):
            args, kwargs = arguments(case)
            loose = {name: strided(value) for name, value in kwargs.items()}
            result = OWN[op].bind(case.problem, session)(*map(strided, args), **loose)
            wrong += compare(OPS[op], case, host_result(result, case))
    assert not wrong, "\n".join(wrong)


@torch.no_grad()
@pytest.mark.parametrize("op", OWN)
def test_own_kernels_are_one_graph_of_the_results_of_the_plain_call(op: str, session: Any) -> None:
    case = next(case for case in cases_of(op) if case.id == REPRESENTATIVE[op])
    args, kwargs = arguments(case)
    for arg in args:
        assert not isinstance(arg, StepInputs) or arg.groups  # views of a step are made on the host
    bound, graphs = OWN[op].bind(case.problem, session), []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *a, **k: bound(*a, **k), fullgraph=True, dynamic=False, backend=backend)
    results = [tensors_in(run(*args, **kwargs)) for run in (compiled, compiled, bound)]
    torch._dynamo.reset()
    assert len(graphs) == 1
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


REPRESENTATIVE = {
    "attend": "mixed/key_ranges-bf16", "router_topk": "groups4of2-k3-f32", "moe_dispatch": "ep2_permuted-e4-bf16",
    "grouped_mlp": "bias_swigluoai-bf16", "argmax": "ties-v37-f32", "sample": "typical_filters-v37-f32",
    "logprobs": "ties-v37-k6-f32",
}  # fmt: skip


def test_own_kernels_outrank_the_portable_ones_and_decline_float64() -> None:
    assert {kernel.op: kernel.handles for kernel in portable_kernels("neuron") if kernel.op in OWN} == {
        op: kernel.handles for op, kernel in OWN.items()
    }
    for op, kernel in OWN.items():
        case = next(case for case in cases_of(op) if takes(kernel, case))
        reason = kernel.supports(replace(case.problem, dtype="float64"))
        assert kernel.priority == NEURON > 0 and kernel.backend == "neuron"
        assert reason is not None and "no float64" in reason


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (lambda x: x.sort(), "sort"),
        (lambda x: torch.searchsorted(x, x), "searchsorted"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "depends on data"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x.double(), "float64"),
        (lambda x: torch.arange(3) + 1, "int64"),
        (lambda x: x.argmax(), "int64"),
        (lambda x: (x > 0).sum(), "int64"),
        (lambda x: (x > 0).cumsum(0), "int64"),
    ],
)
def test_what_a_static_program_cannot_hold_is_refused_here(program: Any, named: str) -> None:
    with torch.no_grad(), StaticProgram(), pytest.raises(AssertionError, match=named):
        program(torch.ones(3))


# ---- ranking ---------------------------------------------------------------------------------------------------


def tied_rows(rng: np.random.Generator, dtype: torch.dtype, rows: int = 8, vocab: int = 33) -> torch.Tensor:
    """Few distinct values of both signs, zeros of both among them, and some -inf."""
    values = torch.tensor([-np.inf, -3e30, -2.0, -1e-30, -0.0, 0.0, 1e-30, 1.5, 1.75, 3e30]).to(dtype)
    return values[torch.from_numpy(rng.integers(0, len(values), (rows, vocab)))]


@pytest.mark.parametrize("k", [1, 5, 33])
def test_the_largest_come_in_descending_order_and_equal_ones_by_index(k: int) -> None:
    for seed in range(20):
        x = tied_rows(np.random.default_rng(seed), torch.float32)
        order = x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(ranking.largest(x, k), order.int())
        assert torch.equal(ranking.are_largest(x, k), torch.zeros_like(x, dtype=torch.bool).scatter(1, order, True))


def test_the_largest_of_a_row_with_nan_are_indices_within_it() -> None:
    x = torch.full((2, 9), torch.nan)
    x[1, 3:] = 1.0
    for k in (1, 4, 9):
        found = ranking.largest(x, k)
        assert found.shape == (2, k) and int(found.min()) >= 0 and int(found.max()) < 9


@pytest.mark.parametrize("dtype", ranking.UNUSED_BITS)
def test_a_search_finds_the_value_at_which_a_measure_is_full(dtype: torch.dtype) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = tied_rows(rng, dtype).float()
        weights = torch.from_numpy(rng.integers(0, 4, tuple(x.shape)).astype(np.float32))
        limit = torch.from_numpy(rng.integers(1, 60, (len(x), 1)).astype(np.float32))
        found = ranking.reaching(x, (weights, limit), ranking.UNUSED_BITS[dtype])
        enough = [[v for v in row if w[row >= v].sum() >= m] for row, w, m in zip(x, weights, limit, strict=True)]
        assert found[:, 0].tolist() == [max((float(v) for v in values), default=-np.inf) for values in enough]


# ---- sampling --------------------------------------------------------------------------------------------------


def test_filters_keep_what_the_reference_keeps_of_tied_logits() -> None:
    rows, vocab = 40, 60
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logits = np.round(rng.standard_normal((rows, vocab)) * 4) / 4
        logits[:, ::9] = -np.inf
        drawn = {
            "top_k": rng.integers(0, 2 * vocab, rows), "top_p": rng.uniform(0, 1.1, rows),
            "min_p": rng.uniform(0, 0.2, rows),
        }  # fmt: skip
        params = {name: torch.from_numpy(a.astype("i4" if name == "top_k" else "f4")) for name, a in drawn.items()}
        x = torch.from_numpy(logits).float()
        weights = (x - x.amax(-1, keepdim=True)).exp()
        kept = sampling.kept_tokens(x, weights, params, 0)
        for row in range(rows):
            filters = [params[name][row].item() for name in drawn]
            assert sorted(kept_tokens(logits[row], *filters)[0]) == kept[row].nonzero()[:, 0].tolist(), (seed, row)


def test_every_u_draws_a_kept_token_of_its_own_share() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0, 4.0, 0.0]]).expand(9, -1)
    u = torch.tensor([0.0, 0.1, 0.125, 0.25, 0.49, 0.5, 0.75, 0.99, float(np.nextafter(np.float32(1), 0))])
    assert sampling.inverse_cdf(weights, u[:, None]).tolist() == [1, 1, 3, 3, 3, 5, 5, 5, 5]
    assert sampling.inverse_cdf(torch.zeros(1, 4), torch.zeros(1, 1)).tolist() == [-1]


@pytest.mark.parametrize("op", ["sample", "logprobs"])
def test_vocabularies_beyond_exact_counts_are_declined(op: str) -> None:
    problems = [SampleProblem(dtype="float32", rows=1, vocab=vocab) for vocab in (2**24, 2**24 + 1)]
    reasons = [OWN[op].supports(problem) for problem in problems]
    assert reasons[0] is None and "exact up to 16777216" in str(reasons[1])


# ---- attention -------------------------------------------------------------------------------------------------

ATTENDS = {
    "decode-padding": (Paging(((1, 20), (0, 9), (1, 33), (0, 0)), padding=2), {"return_lse": True}),
    "decode-page_starts": (Paging(((1, 40), (0, 9), (1, 50)), padding=2, starts=True), {"page_starts": True}),
    "one_row": (Paging(((9, 40),), padding=3), {"window": 7, "key_ranges": True, "return_lse": True}),
    "rows": (Paging(((9, 40), (0, 5), (4, 4), (1, 17)), padding=3), {"ancestors": True, "softcap": 3.0}),
}


def attend_case(paging: Paging, fields: Mapping[str, Any]) -> Case:
    """Queries of padding tokens are NaN, and so is what lies in the pages where no key is live."""
    rng, problem = np.random.default_rng(5), attend_problem("float32", paging, fields)
    paged = paged_step(rng, paging)
    q = rng.standard_normal((paging.tokens, problem.q_heads, problem.qk_dim))
    q[paging.tokens - paging.padding :] = np.nan
    optional = {
        "key_ranges": np.sort(rng.integers(0, 40, (paging.tokens, 2)), axis=1).astype(np.int32),
        "ancestors": rng.integers(0, 2**32, (paging.tokens, 1), dtype=np.uint32),
    }
    given = {name: array for name, array in optional.items() if getattr(problem, name)}
    return Case("own", problem, (q, CacheArg(make_cache(rng, problem, paged)), paged.step), given)


@pytest.mark.parametrize("name", ATTENDS)
@pytest.mark.parametrize("queries", [1, 2, 5, 100])
def test_attention_in_blocks_of_any_size_is_that_of_the_reference(name: str, queries: int, session: Any) -> None:
    case = attend_case(*ATTENDS[name])
    lanes = attention.lane_shape(case.problem)[0]
    blocks = attention.Blocks(min(queries, lanes), queries if lanes == 1 else 100)
    kernel = replace(OWN["attend"], bind=lambda problem, session: partial(attention.attend, problem, blocks))
    assert not wrong_in(kernel, case, session)


def test_lanes_are_tokens_in_decode_one_row_in_prefill_and_rows_otherwise() -> None:
    shapes = [attention.lane_shape(attend_problem("float32", *ATTENDS[name])) for name in ATTENDS]
    assert shapes == [(4, 1), (4, 1), (1, 12), (4, 9)]


def test_blocks_shrink_to_the_budget_and_what_does_not_fit_is_declined() -> None:
    problem = attend_problem("float32", Paging(((512, 4096),), 32), {"q_heads": 16, "kv_heads": 2, "qk_dim": 64})
    whole, part = (attention.blocks_within(problem, mib) for mib in (4096, 64))
    assert whole == attention.Blocks(1, 512)
    assert part.lanes == 1 and 1 < part.queries < 512
    assert attention.temporary_bytes(problem, part.lanes, part.queries) <= 64 << 20
    assert attention.supports(problem, 64) is None
    assert "exceed its budget of 1 MiB" in str(attention.supports(problem, 1))
    assert "more than 64 blocks" in str(attention.supports(replace(problem, tokens=4096, max_query=4096), 8))


# ---- experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"bias": True}])
def test_few_rows_fetch_the_weights_of_their_own_experts(dtype: str, fields: dict[str, Any], session: Any) -> None:
    rng = np.random.default_rng(9)
    problem = ExpertProblem(dtype=dtype, experts=9, local=9, hidden=12, width=10, k=1, rows=7, **fields)
    x = rng.standard_normal((7, 12))
    x[6] = np.nan  # beyond the last expert's rows
    shapes = {"w13": (9, 20, 12), "w2": (9, 12, 10), "w13_bias": (9, 20), "w2_bias": (9, 12)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    weights = (WeightArg(arrays[name], "experts") for name in ("w13", "w2"))
    offsets = np.array([0, 0, 2, 2, 2, 3, 6, 6, 6, 6], np.int32)
    biases = {name: arrays[name] for name in ("w13_bias", "w2_bias")} if fields else {}
    case = Case("fetched", problem, (x, *weights, offsets), biases)
    assert experts.fetches(problem) and not wrong_in(OWN["grouped_mlp"], case, session)


def test_many_rows_and_large_weights_are_not_fetched() -> None:
    small = ExpertProblem(dtype="float32", experts=9, local=9, hidden=12, width=10, k=1, rows=9)
    assert not experts.fetches(small)
    assert not experts.fetches(replace(small, rows=8, hidden=4096, width=4096))
