"""What the CPU does better than the portable kernels: one-row products, rotary embeddings, experts; attention and
sampling have files of their own."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch

from lineshaft.contract.kernels import Kernel
from lineshaft.contract.problems import ExpertProblem, LinearProblem, RopeProblem
from lineshaft_cpu import attention, sampling
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


def rope_halves(
    tables: Pair, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, out: Pair | None = None
) -> Pair:
    """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated. `tables`: (cos, cos) and (-sin, sin), each
    [max_position, 1, 2, D / 2], so that a rotation is x * cos + swapped(x) * sin."""
    cos, sin = (table.index_select(0, positions) for table in tables)
    out = out or (q.new_empty(q.shape), k.new_empty(k.shape))
    for x, result in zip((q, k), out, strict=True):
        halves = x.unflatten(-1, (2, -1)).to(cos.dtype)
        result.view(halves.shape).copy_(torch.addcmul(halves * cos, halves.flip(2), sin))
    return out


def rope_halves_supports(problem: RopeProblem) -> str | None:
    if problem.head_dim != problem.dim:
        return f"rotates whole heads, not {problem.dim} of {problem.head_dim} values"
    return rope_supports(problem)


def _bind_rope(problem: RopeProblem, session: Any) -> Any:
    def doubled() -> Pair:
        cos, sin = shared_table(problem, session)
        return torch.stack((cos, cos), 1)[:, None], torch.stack((-sin, sin), 1)[:, None]

    key = ("cpu_rope", problem.dim, problem.base, problem.scaling, problem.max_position, problem.dtype)
    return partial(rope_halves, session.constant(key, doubled))


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
        recipe("cpu_rope", "rope", _bind_rope, out=True, priority=PRIORITY, supports=rope_halves_supports),
        recipe(
            "cpu_grouped_mlp", "grouped_mlp", with_problem(grouped_mlp), layout=DENSE, priority=PRIORITY,
            supports=experts_supports,
        ),
        *attention.recipes(),
        *sampling.recipes(),
    ]  # fmt: skip


def cpu_kernels(backend: str = "cpu") -> list[Kernel]:
    """The CPU's own kernels; each has a higher priority than the portable one that it stands in for."""
    return [make(backend) for make in recipes()]


__all__ = ["cpu_kernels"]
