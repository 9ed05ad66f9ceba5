"""The kernels of the Neuron plugin on every smoke case of their ops, and what programs of the device must not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.attention import attend_problem
from lineshaft_contract.ops.cases import Paging
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import CacheArg, StepArg, WeightArg
from lineshaft_contract.packing import weight_packing
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_contract.weights import Local, Param, Stored, Weight
from lineshaft_neuron.kernels import NEURON, neuron_kernels
from lineshaft_neuron.kernels import attend as attention
from lineshaft_neuron.kernels import ranking
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
    return compare(OPS[kernel.op], case, host_result(result, case))


def test_kernels_hold_to_static_programs_and_are_within_tolerance(kernel: Kernel, session: Any) -> None:
    taken = [case for case in cases_of(kernel.op) if takes(kernel, case)]
    assert taken, f"{kernel.name} takes no case of {kernel.op}"
    wrong = [sentence for case in taken for sentence in wrong_in(kernel, case, session)]
    assert not wrong, "\n".join(wrong)
