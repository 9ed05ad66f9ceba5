"""How kernels of XLA backends are made: plain functions on JAX arrays, bound to a problem and traced by a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lineshaft_contract.binding import DENSE, Recipe, dense, stateless, with_problem
from lineshaft_contract.kernels import Kernel, always
from lineshaft_contract.problems import itemsize

__all__ = ["DENSE", "Recipe", "dense", "recipe", "stateless", "with_problem"]


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
