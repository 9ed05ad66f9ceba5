"""What the CPU does better than the portable kernels: one-row products, rotary embeddings, gating, experts.

Packed products, attention and sampling have files of their own.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from lineshaft.contract.kernels import Kernel
from lineshaft.contract.problems import ExpertProblem, LinearProblem, RopeProblem
from lineshaft_cpu import attention, packed, sampling
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe, stateless, with_problem
from lineshaft_torch.kernels.experts import gated_mlp
from lineshaft_torch.kernels.experts import supports as experts_supports
from lineshaft_torch.kernels.rope import Pair, shared_table
from lineshaft_torch.kernels.rope import supports as rope_supports

PRIORITY = 10


def linear_row(x: torch.Tensor, w: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [1, I], w [O, I] -> x @ w^T [1, O]: for one row the matrix-vector product reads weights at twice the speed."""
    weight = dense(w)
    out = x.new_empty((1, weight.shape[0])) if out is None else out
    torch.mv(weight, x[0], out=out[0])
    return out


def linear_row_supports(problem: LinearProblem) -> str | None:
    if problem.m != 1:
        return f"multiplies one row, not {problem.m}"
    if problem.dtype != "bfloat16":
        return f"gains only in bfloat16, not in {problem.dtype}"
    return None


class Angles:
    """(cos, cos) and (-sin, sin) [max_position, 1, D], and the rows of them that the step under way needs: all layers
    ask for the same positions."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._tables = tuple(torch.cat(halves, -1)[:, None] for halves in ((cos, cos), (-sin, sin)))
        self._seen = b""
        self._rows: Pair = (cos, sin)

    def at(self, positions: torch.Tensor) -> Pair:
        """cos and sin [T, 1, D] of positions int32[T]."""
        content = positions.numpy().tobytes()
        if content != self._seen:
            cos, sin = (table.index_select(0, positions) for table in self._tables)
            self._rows, self._seen = (cos, sin), content
        return self._rows


def rope_halves(
    angles: Angles, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, out: Pair | None = None
) -> Pair:
    """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated: x * cos + swapped(x) * sin."""
    cos, sin = angles.at(positions)
    out = out or (q.new_empty(q.shape), k.new_empty(k.shape))
    joined = neighbours(q, k)
    parts = (q, k) if joined is None else (joined,)
    turned = [_turn(x.to(cos.dtype), cos, sin) for x in parts]
    for result, x in zip(out, turned if joined is None else turned[0].split([q.shape[1], k.shape[1]], 1), strict=True):
        result.copy_(x)
    return out


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def neighbours(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """q [T, Hq, D] and k [T, Hk, D] as one array of heads [T, Hq + Hk, D], if k follows q in each row of memory."""
    if q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return None
    adjacent = k.data_ptr() == q.data_ptr() + q.shape[1] * q.shape[2] * q.itemsize
    if not adjacent or q.stride() != k.stride() or q.stride()[1:] != (q.shape[2], 1):
        return None
    return q.as_strided((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.stride())


def silu_mul(x: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, 2F], gate first -> silu(gate) * up [T, F]; the activation is rounded before the product."""
    gate, up = x.chunk(2, -1)
    return torch.mul(F.silu(gate), up, out=out)


def rope_halves_supports(problem: RopeProblem) -> str | None:
    if problem.head_dim != problem.dim:
        return f"rotates whole heads, not {problem.dim} of {problem.head_dim} values"
    return rope_supports(problem)


def _bind_rope(problem: RopeProblem, session: Any) -> Any:
    key = ("cpu_rope", problem.dim, problem.base, problem.scaling, problem.max_position, problem.dtype)
    return partial(rope_halves, session.constant(key, lambda: Angles(*shared_table(problem, session))))


def grouped_mlp(problem: ExpertProblem, x: torch.Tensor, w13: Any, w2: Any, offsets: torch.Tensor) -> torch.Tensor:
    """x [C, H], w13 [L, 2F, H], w2 [L, H, F], offsets int32[L + 1] -> [C, H]: each expert on its own rows only."""
    out, bounds = torch.zeros_like(x, memory_format=torch.contiguous_format), offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            out[start:stop] = gated_mlp(problem.activation, x[start:stop], dense(w13)[e], dense(w2)[e])
    return out


def recipes() -> list[Recipe]:
    return [
        recipe(
            "cpu_linear_row", "linear", stateless(linear_row), out=True, layout=DENSE, priority=PRIORITY,
            supports=linear_row_supports,
        ),
        recipe("cpu_silu_mul", "silu_mul", stateless(silu_mul), out=True, priority=PRIORITY),
        recipe("cpu_rope", "rope", _bind_rope, out=True, priority=PRIORITY, supports=rope_halves_supports),
        recipe(
            "cpu_grouped_mlp", "grouped_mlp", with_problem(grouped_mlp), layout=DENSE, priority=PRIORITY,
            supports=experts_supports,
        ),
        *packed.recipes(),
        *attention.recipes(),
        *sampling.recipes(),
    ]  # fmt: skip


def cpu_kernels(backend: str = "cpu") -> list[Kernel]:
    """The CPU's own kernels; each has a higher priority than the portable one that it stands in for."""
    return [make(backend) for make in recipes()]


__all__ = ["cpu_kernels"]
