"""All kernels of the native engine: those in C, and the contract's references for what they leave."""

from __future__ import annotations

from lineshaft_contract.kernels import Kernel
from lineshaft_cpu.engine.kernels import attention, choice, codes, experts, heads, host, products, rows
from lineshaft_cpu.native import Native


def engine_kernels(backend: str, native: Native) -> list[Kernel]:
    """The kernels of sessions at one level of the library."""
    themes = rows, products, codes, heads, attention, choice, experts
    recipes = (recipe for theme in themes for recipe in theme.recipes(native))
    return [*(make(backend) for make in recipes), *host.kernels(backend)]


__all__ = ["engine_kernels"]
