"""Precision by the tolerance rule alone: what computes or accumulates below the executed dtype fails on cases."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.run import compare, named_outputs, run_reference
from lineshaft_contract.ops.spec import EXACT, Case, Numerics, OpSpec

OPS = all_ops()
LOWER = {"float64": "float32", "float32": "bfloat16"}
LOGITS = ("apply_logits", "sample", "argmax", "logprobs")
"""Their results are float32 at most: there are no float64 cases."""


@cache
def cases(op: str) -> list[Case]:
    return list(OPS[op].cases(np.random.default_rng(0), "full"))


def lower(case: Case, dtype: str) -> Case:
    """The case as a kernel would run it that takes `dtype` for the executed one: operands are rounded to it."""
    problem: Any = case.problem
    kv = {"kv_dtype": dtype} if getattr(problem, "kv_dtype", "") == problem.dtype else {}
    return replace(case, problem=replace(problem, dtype=dtype, **kv))


def fails(spec: OpSpec, case: Case, num: Numerics, below: Case) -> bool:
    return bool(compare(spec, case, run_reference(spec, below, num)))


def says_something(spec: OpSpec, case: Case) -> bool:
    """Whether a result of the case is neither 0, infinite nor NaN: such values are exact in any precision."""
    outputs = named_outputs(spec, run_reference(spec, case, EXACT)).values()
    return any(np.any(np.isfinite(values) & (values != 0)) for values in outputs)


CHOOSING = ("sample", "argmax")
"""Only where the low bits decide does a lower dtype choose another token."""


@pytest.mark.parametrize("op", CHOOSING)
def test_a_choice_made_in_bfloat16_fails_on_a_case(op: str) -> None:
    seen = {c.id for c in cases(op) if c.problem.dtype == "float32" and executed_below(OPS[op], c, "bfloat16")}
    assert any("close" in id for id in seen)


def executed_below(spec: OpSpec, case: Case, dtype: str) -> bool:
    return fails(spec, case, Numerics.of(dtype, spec.accumulate), lower(case, dtype))


@pytest.mark.parametrize("op", [name for name in OPS if name not in CHOOSING])
@pytest.mark.parametrize("dtype", LOWER)
def test_a_kernel_that_executes_the_next_lower_dtype_fails_on_every_case(op: str, dtype: str) -> None:
    if op in LOGITS and dtype == "float64":
        pytest.skip("no float64 cases")
    spec, below = OPS[op], LOWER[dtype]
    checked = [c for c in cases(op) if c.problem.dtype == dtype and says_something(spec, c) and differs(c, below)]
    assert len(checked) >= 2
    for case in checked:
        assert executed_below(spec, case, below), case.id


def differs(case: Case, below: str) -> bool:
    """Whether rounding to `below` changes the case at all: not where pages are narrower or all values are exact."""
    narrow = getattr(case.problem, "kv_dtype", case.problem.dtype) != case.problem.dtype
    coarse = ("e128", "ties", "group_ties", "one-k1") if below == "bfloat16" else ()
    exact = ("all_equal", "all_padding", "none_chosen", "extreme", "mask-extreme", *coarse)
    return not (narrow or case.id.startswith(exact))


# ---- accumulation ----------------------------------------------------------------------------------------------------


class Narrow(np.ndarray[Any, Any]):
    """A bfloat16 array whose products are summed in bfloat16 too, one after another."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [np.asarray(x) for x in inputs]
        kwargs = {name: tuple(map(np.asarray, x)) if name == "out" else x for name, x in kwargs.items()}
        if ufunc is np.matmul:
            a, b = (x.astype(ml_dtypes.bfloat16) for x in plain)
            return np.add.reduce(a[..., :, :, None] * b[..., None, :, :], axis=-2).view(Narrow)
        out = getattr(ufunc, method)(*plain, **kwargs)
        return out.view(Narrow) if isinstance(out, np.ndarray) else out


class NarrowSums(Numerics):
    """Everything in bfloat16, sums as well."""

    def load(self, x: Any) -> Any:
        return super().load(x).view(Narrow)

    def save(self, x: Any) -> Any:
        return np.asarray(super().save(x))


SUMS = (
    "linear", "head_linear", "rms_norm", "add_rms_norm", "attend", "grouped_mlp", "expert_mlp", "moe_combine",
    "merge_states", "router_topk", "rope", "logprobs",
)  # fmt: skip
"""Ops that a bfloat16 kernel may not run in bfloat16 throughout. Not among them: what takes one rounding or two (add,
gates, biases), and sums over members, which communication libraries make in the arrays' own dtype."""


@pytest.mark.parametrize("op", SUMS)
def test_sums_in_bfloat16_fail_on_a_case(op: str) -> None:
    narrow = [case for case in cases(op) if case.problem.dtype == "bfloat16"]
    num = NarrowSums("bfloat16", "bfloat16")
    with np.errstate(all="ignore"):
        seen = {case.id for case in narrow if fails(OPS[op], case, num, case)}
    assert seen >= {case.id for case in narrow if case.id.startswith("sums")}
    assert seen
