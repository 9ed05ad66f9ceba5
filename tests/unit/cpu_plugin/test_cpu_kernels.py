"""Every kernel of the CPU backend, portable or its own, on every smoke case of its op that it supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, OpSpec, all_ops
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import CacheArg, StepArg, WeightArg
from lineshaft_contract.packing import weight_packing
from lineshaft_contract.problems import ExpertProblem, LinearProblem, PointwiseProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Local, Param, Stored, Weight
from lineshaft_cpu import native
from lineshaft_cpu.backend import create
from lineshaft_cpu.options import CpuOptions
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_torch.pages import page_view
from lineshaft_torch.tensors import map_tensors, tensors_in

OPS = {name: spec for name, spec in all_ops().items() if not spec.collective}
BACKEND = create(CpuOptions(engine="torch"), World(threads=1))
KERNELS = [kernel for kernel in BACKEND.kernels() if kernel.op in OPS]
LEVELS = [level for level in native.LEVELS if native.reason(level) is None]
"""Instruction set levels of the compiled kernels that this processor runs: each is tested, not only the best."""
BY_ID = {kernel.name: kernel for kernel in KERNELS if "native" not in kernel.name} | {
    f"{kernel.name}-{level}": kernel
    for level in LEVELS
    for kernel in create(CpuOptions(engine="torch", native=level), World(threads=2)).kernels()
    if "native" in kernel.name
}
ALLOCATING = {
    "torch_write_kv", "torch_read_pages", "torch_write_pages", "torch_copy_pages", "torch_copy_slots", "torch_attend",
    "torch_router_topk", "torch_moe_dispatch", "torch_grouped_mlp", "cpu_grouped_mlp", "cpu_linear_packed",
    "cpu_native_write_kv", "torch_logprobs", "torch_apply_logits",
}  # fmt: skip
"""Kernels whose results a tape copies to their place, and write_kv, which has none of its own."""


@cache
def cases_of(op: str) -> tuple[Case, ...]:
    return tuple(OPS[op].cases(np.random.default_rng(2024), "smoke"))


def takes(kernel: Kernel, case: Case) -> bool:
    return not case.problem.features() - kernel.handles and kernel.supports(case.problem) is None


def tensor(array: Any) -> Any:
    return from_host(array.copy()) if isinstance(array, np.ndarray) else array


def packed_weight(value: WeightArg, case: Case, host: Any) -> Weight:
    """Dense, or where the case wants it quantized in codes and scales."""
    problems = {value.kind: case.problem}
    param = Param("w", "w", host.shape, case.problem.dtype, problems, lambda checkpoint, at: Local(()))
    if param.scheme == "none":
        return Weight(0, "w", problems, "dense", {"data": tensor(host)})
    packing = weight_packing(param.scheme)
    assert packing.pack is not None
    leaves = packing.pack(param, Local((Stored("none", host.shape, {"data": host}),)))
    return Weight(0, "w", problems, packing.layout, {name: tensor(leaf) for name, leaf in leaves.items()})


def torch_argument(value: Any, case: Case, first: bool) -> Any:
    """A case's argument as the kernel takes it; the cache is the first argument, other pages are plain arrays."""
    host = operand(value, case.problem)
    if isinstance(value, WeightArg):
        return packed_weight(value, case, host)
    if isinstance(value, CacheArg):
        pages = {name: tensor(array) for name, array in host.items()}
        flat = {name: array.flatten(0, 1).contiguous() for name, array in pages.items()}
        return Cache(0, case.problem, "slots", flat) if first else pages
    if isinstance(value, StepArg):
        return StepInputs({name: tensor(array) for name, array in value.arrays.items()}, value.shape)
    if isinstance(value, Mapping):
        return {name: tensor(array) for name, array in host.items()}
    return [tensor(item) for item in host] if isinstance(value, list) else tensor(host)


def arguments(case: Case) -> tuple[list[Any], dict[str, Any]]:
    caches = [isinstance(value, CacheArg) for value in case.args]
    args = [
        torch_argument(value, case, caches.index(True) == i if any(caches) else False)
        for i, value in enumerate(case.args)
    ]
    return args, {name: torch_argument(value, case, False) for name, value in case.kwargs.items()}


def host_result(result: Any, case: Case) -> Any:
    if isinstance(result, tuple):
        return tuple(host_result(item, case) for item in result)
    if isinstance(result, Cache):
        problem_cache = Cache(0, case.problem, "slots", result.arrays)
        return {name: to_host(array) for name, array in page_view(problem_cache).items()}
    return map_tensors(to_host, result)


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return all(a.shape == b.shape and to_host(a).tobytes() == to_host(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def session() -> Iterator[Any]:
    before = torch.get_num_threads()
    made = BACKEND.session(0)
    yield made
    made.close()
    torch.set_num_threads(before)


@pytest.fixture(params=BY_ID.values(), ids=BY_ID)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


def each(kernel: Kernel, session: Any) -> Iterator[tuple[OpSpec, Case, Callable[..., Any]]]:
    """(spec, case, bound kernel) of every case that the kernel takes: at least one."""
    taken = [case for case in cases_of(kernel.op) if takes(kernel, case)]
    assert taken, f"{kernel.name} takes no case of {kernel.op}"
    for case in taken:
        yield OPS[kernel.op], case, kernel.bind(case.problem, session)


@torch.inference_mode()
def test_kernels_are_within_tolerance_of_the_reference(kernel: Kernel, session: Any) -> None:
    wrong: list[str] = []
    for spec, case, bound in each(kernel, session):
        args, kwargs = arguments(case)
        wrong += compare(spec, case, host_result(bound(*args, **kwargs), case))
    assert not wrong, "\n".join(wrong)


@torch.inference_mode()
def test_kernels_write_to_out_what_they_return(kernel: Kernel, session: Any) -> None:
    for _, case, bound in each(kernel, session):
        assert bound.out == (kernel.name not in ALLOCATING)
        if not bound.out:
            continue
        args, kwargs = arguments(case)
        expected = bound(*args, **kwargs)
        out = map_tensors(
            lambda t: (
                torch.empty_like(t, memory_format=torch.contiguous_format).view(torch.uint8).fill_(0x7F).view(t.dtype)
            ),
            expected,
        )
        given = bound(*args, **kwargs, out=out)
        assert same_bits(out, expected), case.id
        pointers = [t.data_ptr() for t in tensors_in(out)]
        assert [t.data_ptr() for t in tensors_in(given)] == pointers, case.id


@torch.inference_mode()
def test_kernels_accept_rows_with_a_stride_and_leave_inputs_alone(kernel: Kernel, session: Any) -> None:
    def strided(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or not value.is_floating_point():
            return value
        rows = value.flatten(1)
        wide = torch.full((rows.shape[0], rows.shape[1] + 8), float("nan"), dtype=value.dtype)
        wide[:, 4:-4] = rows
        return wide[:, 4:-4].unflatten(1, value.shape[1:])

    for spec, case, bound in each(kernel, session):
        expected = bound(*arguments(case)[0], **arguments(case)[1])
        args, kwargs = arguments(case)
        loose = [arg if isinstance(arg, (list, dict)) else strided(arg) for arg in args]
        got = bound(*loose, **kwargs)
        wrong = compare(spec, case, host_result(got, case))
        assert not wrong and len(tensors_in(got)) == len(tensors_in(expected)), "\n".join(wrong)
        plain = [arg for arg in args if not isinstance(arg, Cache)]
        fresh = [arg for arg in arguments(case)[0] if not isinstance(arg, Cache)]
        assert same_bits(plain, fresh), case.id


def test_every_required_op_has_a_portable_kernel_for_every_case_without_features() -> None:
    for op, spec in OPS.items():
        if not spec.required:
            continue
        for case in cases_of(op):
            if not case.problem.features():
                assert any(takes(k, case) for k in KERNELS if k.op == op), f"{op} {case.id}"


def test_no_two_kernels_tie() -> None:
    for op in OPS:
        for case in cases_of(op):
            priorities = [kernel.priority for kernel in KERNELS if kernel.op == op and takes(kernel, case)]
            assert len(set(priorities)) == len(priorities), f"{op} {case.id}"


@torch.inference_mode()
@pytest.mark.parametrize("op", sorted(name for name, spec in OPS.items() if spec.default))
def test_composites_are_right_through_their_default_decomposition(op: str, session: Any) -> None:
    spec = OPS[op]
    assert spec.default is not None
    wrong: list[str] = []
    for case in cases_of(op):
        args, kwargs = arguments(case)
        result = spec.default(Parts(spec, case.problem, session), case.problem, *args, **kwargs)
        wrong += compare(spec, case, host_result(result, case))
    assert not wrong, "\n".join(wrong)


class Parts:
    """The ops inside a composite, each bound to the best kernel under its part of the composite's own problem."""

    def __init__(self, spec: OpSpec, problem: Any, session: Any) -> None:
        self._parts, self._problem, self._session = spec.parts(problem), problem, session

    def __getattr__(self, op: str) -> Any:
        problem = self._parts.get(op, self._problem)
        if op == "write_kv":
            problem = problem.kv
        if op == "head_linear":
            problem = LinearProblem(dtype=problem.dtype, n=0, k=0, heads=problem.q_heads)
        if op in ("concat", "add"):
            problem = PointwiseProblem(dtype=problem.dtype)
        if op in ("moe_dispatch", "moe_combine"):
            problem = ExpertProblem(dtype=problem.dtype, experts=0, local=0, hidden=0, width=0)
        fitting = [k for k in KERNELS if k.op == op and not problem.features() - k.handles and not k.supports(problem)]
        return max(fitting, key=lambda k: k.priority).bind(problem, self._session)
