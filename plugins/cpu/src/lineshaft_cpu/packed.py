"""Matrix products over weights that oneDNN has put in the block order of its own kernels, once, when they are loaded.

A product over dense bf16 weights reorders them at every call, which costs more than the product itself where rows are
few; a dense float32 one goes to a library that some processors are slow in. The operators are private to torch's
compiler backend, hence `available`; the kit bounds torch's version.
"""

from __future__ import annotations

from typing import Any

import torch

from lineshaft_contract.problems import LinearProblem
from lineshaft_contract.weights import Local, Param
from lineshaft_cpu.priority import NATIVE
from lineshaft_torch.bound import Recipe, dense, recipe, stateless
from lineshaft_torch.packing import dense_leaves

BLOCKED = "onednn_blocked"
TYPICAL_ROWS = 512
"""Rows that the block order is chosen for: it is as good for few rows, while one chosen for few is worse for many."""


def available() -> str | None:
    """None, or why this torch cannot pack weights."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported"):
        if not hasattr(torch.ops.mkldnn, name):
            return f"this torch lacks the operator mkldnn.{name}"
    return None


def pack(param: Param, local: Local) -> dict[str, Any]:
    """{"data": the weight [O, I] as an opaque blocked tensor}."""
    plain = dense_leaves(param, local)["data"]
    with torch.no_grad():
        return {"data": torch.ops.mkldnn._reorder_linear_weight(plain, TYPICAL_ROWS)}


def linear(x: torch.Tensor, w: Any, *, bias: Any = None) -> torch.Tensor:
    """x [T, I], w [O, I] blocked, bias [O] -> x @ w^T + bias [T, O]."""
    added = None if bias is None else dense(bias).contiguous()
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, w.arrays["data"], added, "none", [], "")
    return found


def supports(problem: LinearProblem) -> str | None:
    if problem.dtype not in ("bfloat16", "float32"):
        return f"packs bfloat16 and float32 weights, not {problem.dtype}"
    reason = available()
    if reason is None and problem.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "torch packs bfloat16 only on processors with AVX-512 or the like"
    return reason


def recipes() -> list[Recipe]:
    return [
        recipe(
            "cpu_linear_packed",
            "linear",
            stateless(linear),
            layout=BLOCKED,
            priority=NATIVE,
            supports=supports,
            pack=pack,
            handles=frozenset({"bias"}),
        )
    ]
