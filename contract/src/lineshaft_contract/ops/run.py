"""Running an op's reference on a case, and comparing a kernel's results with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lineshaft_contract.ops.spec import (
    EXACT,
    CacheArg,
    Case,
    HostArray,
    Numerics,
    OpSpec,
    StepArg,
    WeightArg,
    numpy_dtype,
)
from lineshaft_contract.problems import Problem


def run_reference(spec: OpSpec, case: Case, num: Numerics) -> Any:
    """The reference's result on the case's operands, rounded to the executed dtype whatever `num` is, so that the
    rounding of operands is no kernel's error.

    The exact result is `run_reference(spec, case, EXACT)`, the reference run
    `run_reference(spec, case, Numerics.of(case.problem.dtype, spec.accumulate))`.
    """
    args = [operand(arg, case.problem) for arg in case.args]
    kwargs = {name: operand(value, case.problem) for name, value in case.kwargs.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        return spec.reference(case.problem, *args, num=num, **kwargs)


def operand(value: Any, problem: Problem) -> Any:
    """What a reference takes for an argument of a case: float64 arrays rounded to `problem.dtype`, pages to its
    `kv_dtype`; float32 and integer arrays, steps and statics as they are; weights and caches unwrapped."""
    if isinstance(value, WeightArg):
        return rounded(value.array, problem.dtype)
    if isinstance(value, CacheArg):
        kv_dtype = getattr(problem, "kv_dtype", problem.dtype)
        return {name: rounded(pages, kv_dtype) for name, pages in value.pages.items()}
    if isinstance(value, StepArg):
        return value
    if isinstance(value, Mapping):
        return {name: operand(item, problem) for name, item in value.items()}
    if isinstance(value, list):
        return [operand(item, problem) for item in value]
    return rounded(value, problem.dtype) if isinstance(value, np.ndarray) else value


def rounded(array: HostArray, dtype: str) -> HostArray:
    """A float64 array in `dtype`; any other as it is, because its dtype is the one of the op's signature."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(numpy_dtype(dtype)) if array.dtype == np.float64 else array


def named_outputs(spec: OpSpec, result: Any) -> dict[str, HostArray]:
    """A result as named host arrays: "0", "1", … for outputs or members, "cache.k", … for a returned cache.

    The null page of a returned cache means nothing and is left out.
    """
    found: dict[str, HostArray] = {}
    for index, item in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
        if isinstance(item, Mapping):
            found |= {f"cache.{name}": pages[1:] for name, pages in item.items()}
        else:
            found[str(index)] = item
    return found


def compare(spec: OpSpec, case: Case, result: Any) -> list[str]:
    """One sentence for each output of a kernel that is not within the op's tolerance; `result` in host arrays, in
    the shape that the reference returns."""
    exact = named_outputs(spec, run_reference(spec, case, EXACT))
    run = named_outputs(spec, run_reference(spec, case, Numerics.of(case.problem.dtype, spec.accumulate)))
    got = named_outputs(spec, result)
    if got.keys() != exact.keys():
        return [f"outputs {', '.join(got)} instead of {', '.join(exact)}"]
    found = ((name, spec.tolerance_of(name).check(case.problem, got[name], exact[name], run[name])) for name in exact)
    return [f"{spec.name} {case.id} output {name}: {reason}" for name, reason in found if reason]
