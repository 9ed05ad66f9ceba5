"""The one kernel that this backend does not share: a product that reads its weight transposed, and packs it so."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lineshaft.contract.kernels import Kernel
from lineshaft.contract.problems import LinearProblem
from lineshaft.contract.weights import Local, Param, Weight
from lineshaft.weights import dequantize
from lineshaft_torch.bound import recipe, stateless

LAYOUT = "toy_transposed"


def transpose(param: Param, local: Local) -> dict[str, np.ndarray[Any, Any]]:
    """The packing `toy_transposed`: the share's parts [out, in], joined, as one array [in, out] of `param.dtype`."""
    whole = np.concatenate([dequantize(part, param.dtype) for part in local.parts])
    return {"transposed": np.ascontiguousarray(whole.T)}


def linear(x: torch.Tensor, w: Weight, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, I], w [O, I], kept as [I, O] -> x @ w^T [T, O]."""
    return torch.mm(x, w.arrays["transposed"], out=out)


def supports(problem: LinearProblem) -> str | None:
    if problem.dtype == "float64":
        return "exists for float32 and bfloat16, not for float64"
    return None


def toy_kernels(backend: str) -> list[Kernel]:
    """The kernels of this plugin. It lists no feature in `handles`, so it never gets a product with a bias."""
    make = recipe(
        "toy_linear", "linear", stateless(linear), out=True, layout=LAYOUT, pack=transpose, priority=10,
        supports=supports,
    )  # fmt: skip
    return [make(backend)]
