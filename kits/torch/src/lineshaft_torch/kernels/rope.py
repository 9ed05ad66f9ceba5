"""Rotary embeddings from a table of angles that is computed once, when the kernel is bound."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from lineshaft.contract.problems import RopeProblem, RopeScaling

from lineshaft_torch.arrays import accumulator, torch_dtype
from lineshaft_torch.bound import Recipe, recipe

Pair = tuple[torch.Tensor, torch.Tensor]


def inverse_frequencies(problem: RopeProblem) -> np.ndarray[Any, Any]:
    """float64[dim / 2]: angle per position, after scaling (llama3: the Llama 3.1 model card's rule)."""
    scaling = problem.scaling
    freqs = problem.base ** -(np.arange(0, problem.dim, 2, dtype=np.float64) / problem.dim)
    if scaling.kind == "linear":
        freqs = freqs / scaling.factor
    if scaling.kind == "llama3":
        freqs = _llama3(freqs, scaling)
    return freqs / np.asarray(scaling.freq_factors) if scaling.freq_factors else freqs


def _llama3(freqs: np.ndarray[Any, Any], scaling: RopeScaling) -> np.ndarray[Any, Any]:
    turns = scaling.original_context * freqs / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep * freqs + (1 - keep) * freqs / scaling.factor


def angle_table(problem: RopeProblem, device: torch.device) -> Pair:
    """(cos, sin) [max_position, dim / 2] for a problem that bounds its positions."""
    dtype = accumulator(torch_dtype(problem.dtype))
    freqs = torch.from_numpy(inverse_frequencies(problem)).to(dtype)
    angles = torch.arange(problem.max_position, dtype=dtype)[:, None] * freqs
    return angles.cos().to(device), angles.sin().to(device)


def rotate(dim: int, interleaved: bool, cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], cos and sin [T, 1, dim / 2] -> the first `dim` values of each head rotated, in cos's dtype."""
    turned = x[..., :dim]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    first, second = a * cos - b * sin, b * cos + a * sin
    joined = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((joined, x[..., dim:].to(joined.dtype)), -1) if dim < x.shape[-1] else joined


def rope(
    dim: int, interleaved: bool, table: Pair, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, out: Pair | None = None
) -> Pair:
    """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated."""
    cos, sin = (t.index_select(0, positions)[:, None] for t in table)
    turned = tuple(rotate(dim, interleaved, cos, sin, x) for x in (q, k))
    if out is None:
        return turned[0].to(q.dtype), turned[1].to(k.dtype)
    return out[0].copy_(turned[0]), out[1].copy_(turned[1])


def supports(problem: RopeProblem) -> str | None:
    if problem.max_position < 1:
        return "needs max_position, because it reads angles from a table"
    if problem.scaling.kind not in ("none", "linear", "llama3"):
        return f"does not know rope scaling {problem.scaling.kind!r}"
    return None


def _bind(problem: RopeProblem, session: Any) -> Any:
    return partial(rope, problem.dim, problem.interleaved, angle_table(problem, session.device))


def recipes() -> list[Recipe]:
    handles = frozenset({"interleaved"})
    return [recipe("torch_rope", "rope", _bind, out=True, handles=handles, supports=supports)]
