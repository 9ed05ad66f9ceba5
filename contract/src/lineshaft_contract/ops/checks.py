"""What `specialise` and `infer` share: reading abstract arguments and refusing wrong ones with a typed error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.problems import KVProblem, Problem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import ArraySpec
from lineshaft_contract.weights import Weight

P = TypeVar("P", bound=Problem)


def refuse(op: str, given: str, expected: str) -> NoReturn:
    """Raises ContractViolation."""
    raise ContractViolation(f"ops.{op}: given {given}; expected {expected}")


def array_spec(op: str, name: str, value: Any) -> ArraySpec:
    """The spec of an abstract array; raises ContractViolation for anything else."""
    spec = getattr(value, "spec", None)
    if not isinstance(spec, ArraySpec):
        refuse(op, f"{name} = {type(value).__name__}", "an array")
    return spec


def expect(op: str, name: str, value: Any, shape: Sequence[int | None], dtype: str = "") -> ArraySpec:
    """The spec of `value`, whose shape must match `shape` (None matches any size) and whose dtype `dtype` ("" any).

    Raises ContractViolation.
    """
    spec = array_spec(op, name, value)
    fits = len(spec.shape) == len(shape) and all(w in (None, n) for n, w in zip(spec.shape, shape, strict=True))
    if not fits or dtype not in ("", spec.dtype):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        refuse(op, f"{name} {spec.dtype}{list(spec.shape)}", f"{dtype}[{wanted}]")
    return spec


def matrix_rows(spec: ArraySpec) -> int:
    """How many rows there are over the last dim."""
    return math.prod(spec.shape[:-1])


def base_problem(op: str, base: Any, kind: type[P]) -> P:
    """`base` as the problem that the model declared; raises ContractViolation where it declared none or another."""
    if not isinstance(base, kind):
        refuse(op, f"base problem {type(base).__name__}", f"a {kind.__name__} declared by the model")
    return base


def weight_problem(op: str, base: Any, weight: Any, use: str, kind: type[P]) -> P:
    """The problem under which `weight` is used as a `use`, unless `base` is given; raises ContractViolation."""
    if base is None:
        if not isinstance(weight, Weight) or use not in weight.problems:
            has = f"a weight for {sorted(weight.problems)}" if isinstance(weight, Weight) else type(weight).__name__
            refuse(op, has, f"a weight whose Param lists the kind {use!r}")
        base = weight.problems[use]
    return base_problem(op, base, kind)


def cache_problem(op: str, cache: Any) -> KVProblem:
    """The KVProblem of a cache argument; raises ContractViolation."""
    if not isinstance(cache, Cache) or not isinstance(cache.problem, KVProblem):
        refuse(op, type(cache).__name__, "a paged KV cache")
    return cache.problem


def wide(dtype: str) -> str:
    """The dtype of results that stay unrounded (lse, router probabilities): float32, or float64 for float64."""
    return "float64" if dtype == "float64" else "float32"
