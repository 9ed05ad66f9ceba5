"""Small parts that kits make kernels of, whatever their array library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lineshaft_contract.kernels import Bound, Kernel
from lineshaft_contract.weights import Weight

DENSE = "dense"
"""The packing of a weight that is one plain array, in checkpoint order: {"data": ...}."""

Recipe = Callable[[str], Kernel]
"""A kernel that still lacks its backend's name."""


def stateless(run: Bound) -> Callable[[Any, Any], Bound]:
    """A `bind` for a function that needs neither problem nor session."""
    return lambda problem, session: run


def with_problem(run: Bound) -> Callable[[Any, Any], Bound]:
    """A `bind` for a function whose first argument is the problem."""
    return lambda problem, session: partial(run, problem)


def dense(weight: Any) -> Any:
    """The array of a densely packed weight; a bare array passes."""
    return weight.arrays["data"] if isinstance(weight, Weight) else weight
