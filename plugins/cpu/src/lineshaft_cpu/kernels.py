"""What the CPU does better than the portable kernels: one-row products, rotary embeddings, gating, experts.

Packed products, attention and sampling have files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """cos (for both halves of a head) [max_position, 1, D] and sin [max_position, 1, D / 2], and the rows of them that
    the step under way needs: all layers ask for the same positions."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._tables = torch.cat((cos, cos), -1)[:, None], sin[:, None]
        self._seen = b""
        self._rows: Pair = (cos, sin)

    def at(self, positions: torch.Tensor) -> Pair:
        """cos [T, 1, D] and sin [T, 1, D / 2] of positions int32[T]."""
        content = positions.numpy().tobytes()
        if content != self._seen:
            cos, sin = (table.index_select(0, positions) for table in self._tables)
            self._rows, self._seen = (cos, sin), content
        return self._rows


class Turn:
    """The rotation of one array x [T, H, D] into `results`, consecutive shares of its heads: six calls over views that
    are made once. `space` holds two arrays of x's shape in the accumulation dtype, shared by all layers."""

    def __init__(self, x: torch.Tensor, results: Sequence[torch.Tensor], space: torch.Tensor) -> None:
        self._x, (self._wide, self._turned) = x, space.unbind(0)
        (self._a, self._b), (self._first, self._second) = (part.chunk(2, -1) for part in (self._wide, self._turned))
        shares = self._turned.split([result.shape[1] for result in results], 1)
        self._results = list(zip(results, shares, strict=True))

    def __call__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._wide.copy_(self._x)
        torch.mul(self._wide, cos, out=self._turned)
        self._first.addcmul_(self._b, sin, value=-1)
        self._second.addcmul_(self._a, sin)
        for result, share in self._results:
            result.copy_(share)


class Rope:
    """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated, halves of a head against each other.

    A tape passes the same tensors at every replay, so their views are kept, with the tensors that they belong to.
    """

    def __init__(self, angles: Angles) -> None:
        self._angles = angles
        self._spaces: dict[tuple[int, ...], torch.Tensor] = {}
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor, Pair, list[Turn]]] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, out: Pair | None = None) -> Pair:
        angles = self._angles.at(positions)
        results = (q.new_empty(q.shape), k.new_empty(k.shape)) if out is None else out
        for turn in self._turns(q, k, results, angles[0].dtype, keep=out is not None):
            turn(*angles)
        return results

    def _turns(self, q: torch.Tensor, k: torch.Tensor, out: Pair, wide: torch.dtype, keep: bool) -> list[Turn]:
        known = self._kept.get(id(out[0])) if keep else None
        if known is not None and known[0] is q and known[1] is k and known[2][0] is out[0] and known[2][1] is out[1]:
            return known[3]
        joined = neighbours(q, k)
        parts = [(q, out[:1]), (k, out[1:])] if joined is None else [(joined, out)]
        made = [Turn(x, results, self._space(x, wide)) for x, results in parts]
        if keep:
            self._kept[id(out[0])] = (q, k, out, made)
        return made

    def _space(self, x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        shape = (2, *x.shape)
        if shape not in self._spaces:
            self._spaces[shape] = torch.empty(shape, dtype=wide)
        return self._spaces[shape]


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
    return Rope(session.constant(key, lambda: Angles(*shared_table(problem, session))))


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
