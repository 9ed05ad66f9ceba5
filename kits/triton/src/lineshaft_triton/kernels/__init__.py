"""All kernels of this kit. Import it only once `interpreting.require_mode` has settled how they run."""

from __future__ import annotations

from lineshaft_contract.kernels import Kernel
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.kernels import (
    attend,
    experts,
    gated,
    linear,
    logits,
    merge,
    moe,
    norm,
    pages,
    rope,
    router,
    rows,
    sampling,
    write,
)
from lineshaft_triton.targets import Target

if interpreting():
    from lineshaft_triton.corrected_interpreter import correct_interpreter

    correct_interpreter()

FAMILIES = (attend, experts, gated, linear, logits, merge, moe, norm, pages, rope, router, rows, sampling, write)


def triton_kernels(backend: str, where: Target) -> list[Kernel]:
    """Every kernel, made for a target and registered for `backend`. Each family's module gives its recipes."""
    return [recipe(backend) for family in FAMILIES for recipe in family.recipes(where)]


__all__ = ["triton_kernels"]
