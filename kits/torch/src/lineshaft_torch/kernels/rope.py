"""Rotary embeddings from a table of angles that is computed once, when the kernel is bound."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lineshaft_contract.ops.rope import rope_frequencies
from lineshaft_contract.problems import RopeProblem
from lineshaft_torch.arrays import accumulator, torch_dtype
from lineshaft_torch.bound import Recipe, recipe

Pair = tuple[torch.Tensor, torch.Tensor]


def angle_table(problem: RopeProblem, device: torch.device) -> Pair:
    """(cos, sin) [max_position, dim / 2] times `attention_factor`, computed in float64 and kept in the accumulation
    dtype."""
    dtype = accumulator(torch_dtype(problem.dtype))
    freqs = torch.from_numpy(rope_frequencies(problem))
    angles = torch.arange(problem.max_position, dtype=torch.float64)[:, None] * freqs
    cos, sin = problem.attention_factor * angles.cos(), problem.attention_factor * angles.sin()
    return cos.to(device, dtype), sin.to(device, dtype)


def shared_table(problem: RopeProblem, session: Any) -> Pair:
    """The angle table, made once per session for all problems that agree in it."""
    key = (
        "rope", problem.dim, problem.base, problem.scaling, problem.attention_factor, problem.max_position,
        problem.dtype,
    )  # fmt: skip
    table: Pair = session.constant(key, lambda: angle_table(problem, session.device))
    return table


def rotate(dim: int, interleaved: bool, cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], cos and sin [T, 1, dim / 2] -> the first `dim` values of each head rotated, in cos's dtype."""
    turned = x[..., :dim]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    first, second = a * cos - b * sin, b * cos + a * sin
    joined = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((joined, x[..., dim:].to(joined.dtype)), -1) if dim < x.shape[-1] else joined


def rope(
    dim: int,
    interleaved: bool,
    table: Pair,
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    out: Pair | None = None,
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
    if problem.scaling.kind not in ("none", "linear", "llama3", "yarn"):
        return f"does not know rope scaling {problem.scaling.kind!r}"
    return None


def _bind(problem: RopeProblem, session: Any) -> Any:
    return partial(rope, problem.dim, problem.interleaved, shared_table(problem, session))


def recipes() -> list[Recipe]:
    handles = frozenset({"interleaved", "attention_factor"})
    return [recipe("torch_rope", "rope", _bind, out=True, handles=handles, supports=supports)]
