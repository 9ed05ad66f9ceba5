"""Matrix products and the embedding lookup, over densely packed weights and over codes of 8 bits and of 4."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, INT4, LEAST_SCALE, LINEAR_SCHEMES, weight_scheme
from lineshaft_contract.packing import weight_packing
from lineshaft_contract.problems import EmbedProblem, LinearProblem
from lineshaft_torch.arrays import accumulator, torch_dtype
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe, stateless, with_problem

Out = torch.Tensor | None
EXACT_COLUMNS = 1024
"""Products of int8 codes whose sum is exact in float32 however large they are: 127^2 of them stay below 2^24."""


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
    return _finished(sums, bias, x.dtype, out)


def grouped_linear(x: torch.Tensor, w: Any, *, bias: Any = None, out: Out = None) -> torch.Tensor:
    """x [T, I], packed codes uint8 [O, I / 2] and scales [O, groups] of w (`pack_groups`), bias [O] -> x @ w^T + bias
    [T, O]; all in float32 or wider, w too, which each call restores."""
    wide, packed, scale = accumulator(x.dtype), w.arrays["q"], w.arrays["scale"]
    codes = torch.stack((packed & 15, packed >> 4), -1).view(*scale.shape, -1).to(wide).sub_(8)
    whole = codes.mul_(scale.to(wide)[..., None]).view(packed.shape[0], -1)
    return _finished(torch.mm(x.to(wide), whole.t()), bias, x.dtype, out)


def quantized_rows(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, I] -> codes [T, I], still in float32, and scales f32[T, 1], as `ops.quantize.quantize_rows` has them."""
    found, wide = weight_scheme("linear", scheme), x.float()
    scale = wide.abs().amax(1, keepdim=True) / found.top
    scale = torch.where(scale < float(LEAST_SCALE), 1.0, scale)
    codes = (wide / scale).clamp_(-found.top, found.top)
    codes = codes.round_() if found.dtype == "int8" else codes.to(torch_dtype(found.dtype)).float()
    kept = scale.isfinite()
    return codes.masked_fill_(~kept, 0), torch.where(kept, scale, torch.nan)


def activated_linear(scheme: str, x: torch.Tensor, w: Any, *, bias: Any = None, out: Out = None) -> torch.Tensor:
    """x [T, I], codes [O, I] and scales [O] of w, bias [O] -> (codes of x @ codes^T) * scales of both + bias [T, O].

    Sums of int8 codes are exact, those of fp8 codes are made in float32 or wider.
    """
    wide, codes, k = accumulator(x.dtype), w.arrays["q"], x.shape[1]
    given, tokens = quantized_rows(x, scheme)
    step = EXACT_COLUMNS if codes.dtype == torch.int8 else k
    blocks = (slice(first, first + step) for first in range(0, k, step))
    sums = [torch.mm(given[:, block].to(wide), codes[:, block].to(wide).t()) for block in blocks]
    total = sums[0] if len(sums) == 1 else torch.stack(sums).to(torch.int32).sum(0, dtype=torch.int32).to(wide)
    return _finished(total.mul_(tokens.to(wide)).mul_(w.arrays["scale"].to(wide)), bias, x.dtype, out)


def _finished(sums: torch.Tensor, bias: Any, dtype: torch.dtype, out: Out) -> torch.Tensor:
    """sums [T, O], which may be changed, plus bias [O], rounded once."""
    if bias is not None:
        sums.add_(dense(bias).to(sums.dtype))
    return sums.to(dtype) if out is None else out.copy_(sums)


def head_linear(x: torch.Tensor, w: Any, *, out: Out = None) -> torch.Tensor:
    """x [T, H, I], w [H, O, I] -> per head x @ w^T [T, H, O]."""
    product = torch.bmm(x.transpose(0, 1), dense(w).transpose(1, 2)).transpose(0, 1)
    return product.contiguous() if out is None else out.copy_(product)


def quantized_recipe(scheme: str) -> Recipe:
    """The recipe of a product over weights of one scheme."""

    def supports(problem: LinearProblem) -> str | None:
        return None if problem.scheme == scheme else f"is for weights of scheme {scheme}, not {problem.scheme}"

    run = partial(activated_linear, scheme) if scheme in ACTIVATION_SCHEMES else quantized_linear
    packing = weight_packing(scheme)
    return recipe(
        f"torch_linear_{scheme}", "linear", stateless(grouped_linear if scheme == INT4 else run), out=True,
        layout=packing.layout, pack=packing.pack, handles=frozenset({"bias", "scheme"}), supports=supports,
    )  # fmt: skip


def recipes() -> list[Recipe]:
    heads = frozenset({"heads"})
    return [
        recipe("torch_embed", "embed", with_problem(embed), out=True, layout=DENSE, handles=frozenset({"scale"})),
        recipe("torch_linear", "linear", stateless(linear), out=True, layout=DENSE, handles=frozenset({"bias"})),
        *map(quantized_recipe, LINEAR_SCHEMES),
        recipe("torch_head_linear", "head_linear", stateless(head_linear), out=True, layout=DENSE, handles=heads),
    ]
