"""All kernels of the CPU plugin: experts here, packed products, attention, sampling and the compiled ones in files of
their own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import ExpertProblem
from lineshaft_cpu import attention, compiled, packed, sampling
from lineshaft_cpu.priority import TORCH
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe, with_problem
from lineshaft_torch.kernels.experts import EXPERT_FEATURES, gated_mlp, of_expert
from lineshaft_torch.kernels.experts import supports as experts_supports


def grouped_mlp(
    problem: ExpertProblem,
    x: torch.Tensor,
    w13: Any,
    w2: Any,
    offsets: torch.Tensor,
    *,
    w13_bias: Any = None,
    w2_bias: Any = None,
) -> torch.Tensor:
    """x [C, H], w13 [L, 2F, H], w2 [L, H, F], offsets int32[L + 1], biases [L, 2F] and [L, H] -> [C, H]: each expert on
    its own rows only."""
    out, bounds = torch.zeros_like(x, memory_format=torch.contiguous_format), offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            biases = of_expert(e, w13_bias, w2_bias)
            out[start:stop] = gated_mlp(problem, x[start:stop], dense(w13)[e], dense(w2)[e], biases)
    return out


def recipes(native: str) -> list[Recipe]:
    return [
        recipe(
            "cpu_grouped_mlp", "grouped_mlp", with_problem(grouped_mlp), layout=DENSE, priority=TORCH,
            handles=EXPERT_FEATURES, supports=experts_supports,
        ),
        *packed.recipes(),
        *attention.recipes(),
        *sampling.recipes(),
        *compiled.Recipes(native).all(),
    ]  # fmt: skip


def cpu_kernels(backend: str = "cpu", native: str = "auto") -> list[Kernel]:
    """The CPU's own kernels; each has a higher priority than the portable one that it stands in for. `native` is the
    level of the compiled ones."""
    return [make(backend) for make in recipes(native)]


__all__ = ["cpu_kernels"]
