"""Matrix products and the embedding lookup, over densely packed weights and over codes of 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from lineshaft_contract.ops.quantize import WEIGHT_SCHEMES
from lineshaft_contract.packing import pack_rows
from lineshaft_contract.problems import EmbedProblem, LinearProblem
from lineshaft_torch.arrays import accumulator
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe, stateless, with_problem

Out = torch.Tensor | None


def embed(
    problem: EmbedProblem, ids: torch.Tensor, table: Any, vocab_start: torch.Tensor, *, out: Out = None
) -> torch.Tensor:
    """ids int32[T], table [V, H], vocab_start int32[1] -> table[ids - vocab_start] * scale [T, H]; 0 outside the
    shard."""
    rows = dense(table)
    local = ids - dense(vocab_start)
    inside = (local >= 0) & (local < rows.shape[0])
    found = rows.index_select(0, local.clamp(0, rows.shape[0] - 1))
    found = found.masked_fill_(~inside[:, None], 0)
    if problem.scale != 1.0:
        found = found.mul_(problem.scale)
    return found if out is None else out.copy_(found)


def linear(x: torch.Tensor, w: Any, *, bias: Any = None, out: Out = None) -> torch.Tensor:
    """x [T, I], w [O, I], bias [O] -> x @ w^T + bias [T, O]."""
    if bias is None:
        return torch.mm(x, dense(w).t(), out=out)
    return torch.addmm(dense(bias), x, dense(w).t(), out=out)


def quantized_linear(x: torch.Tensor, w: Any, *, bias: Any = None, out: Out = None) -> torch.Tensor:
    """x [T, I], codes [O, I] and scales [O] of w, bias [O] -> (x @ codes^T) * scales + bias [T, O]; all in float32 or
    wider, the codes too, of which each call makes a copy."""
    wide = accumulator(x.dtype)
    sums = torch.mm(x.to(wide), w.arrays["q"].to(wide).t()).mul_(w.arrays["scale"].to(wide))
    if bias is not None:
        sums.add_(dense(bias).to(wide))
    return sums.to(x.dtype) if out is None else out.copy_(sums)


def head_linear(x: torch.Tensor, w: Any, *, out: Out = None) -> torch.Tensor:
    """x [T, H, I], w [H, O, I] -> per head x @ w^T [T, H, O]."""
    product = torch.bmm(x.transpose(0, 1), dense(w).transpose(1, 2)).transpose(0, 1)
    return product.contiguous() if out is None else out.copy_(product)


def quantized_recipe(scheme: str) -> Recipe:
    """The recipe of `quantized_linear` for one scheme."""

    def supports(problem: LinearProblem) -> str | None:
        return None if problem.scheme == scheme else f"is for weights of scheme {scheme}, not {problem.scheme}"

    return recipe(
        f"torch_linear_{scheme}", "linear", stateless(quantized_linear), out=True, layout=f"{scheme}_rows",
        pack=pack_rows(scheme), handles=frozenset({"bias", "scheme"}), supports=supports,
    )  # fmt: skip


def recipes() -> list[Recipe]:
    heads = frozenset({"heads"})
    return [
        recipe("torch_embed", "embed", with_problem(embed), out=True, layout=DENSE, handles=frozenset({"scale"})),
        recipe("torch_linear", "linear", stateless(linear), out=True, layout=DENSE, handles=frozenset({"bias"})),
        *map(quantized_recipe, WEIGHT_SCHEMES),
        recipe("torch_head_linear", "head_linear", stateless(head_linear), out=True, layout=DENSE, handles=heads),
    ]
