"""What the device's kernels have in common: their rank among kernels, and the dtypes that they decline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lineshaft_contract.kernels import always
from lineshaft_torch.bound import Recipe, recipe

NEURON = 10
"""Above the torch kit's portable kernels, which have 0."""


def neuron_recipe(
    name: str,
    op: str,
    bind: Callable[[Any, Any], Callable[..., Any]],
    *,
    supports: Callable[[Any], str | None] = always,
    **fields: Any,
) -> Recipe:
    """A recipe of the kit that outranks the portable kernel and declines problems in float64."""

    def without_float64(problem: Any) -> str | None:
        if "float64" in (problem.dtype, getattr(problem, "kv_dtype", "")):
            return "the device has no float64; use float32, bfloat16 or float16"
        return supports(problem)

    return recipe(name, op, bind, priority=NEURON, supports=without_float64, **fields)
