"""How kernels of XLA backends are made: plain functions on JAX arrays, bound to a problem and traced by a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lineshaft.contract.kernels import Kernel, always
from lineshaft.contract.problems import itemsize
from lineshaft.contract.weights import Weight

DENSE = "dense"
"""The packing of a weight that is one plain array, in checkpoint order: {"data": ...}."""

Recipe = Callable[[str], Kernel]
"""A kernel that still lacks its backend's name."""


def declines_width(dtype: str) -> str | None:
    """Why no kernel computes in `dtype`: 8 bytes would be halved without a word, 1 byte is for storage."""
    if itemsize(dtype) == 8:
        return f"computes in at most 32 bits, not in {dtype}: the 64-bit mode of JAX is off"
    return f"computes in 16 bits and more, not in {dtype}" if itemsize(dtype) == 1 else None


def recipe(name: str, op: str, bind: Callable[[Any, Any], Callable[..., Any]], **fields: Any) -> Recipe:
    """A Recipe for `op`. `bind(problem, session)` returns a pure function of JAX arrays, which may be tracers.

    Every kernel of a recipe declines dtypes of 8 bytes and of 1; `supports` says what else it declines.
    """
    declines = fields.pop("supports", always)

    def supports(problem: Any) -> str | None:
        return declines_width(problem.dtype) or declines(problem)

    return lambda backend: Kernel(name=name, op=op, backend=backend, bind=bind, supports=supports, **fields)


def stateless(run: Callable[..., Any]) -> Callable[[Any, Any], Callable[..., Any]]:
    """A `bind` for a function that needs neither problem nor session."""
    return lambda problem, session: run


def with_problem(run: Callable[..., Any]) -> Callable[[Any, Any], Callable[..., Any]]:
    """A `bind` for a function whose first argument is the problem."""
    return lambda problem, session: partial(run, problem)


def dense(weight: Any) -> Any:
    """The array of a densely packed weight; a bare array passes."""
    return weight.arrays["data"] if isinstance(weight, Weight) else weight
