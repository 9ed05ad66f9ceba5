"""Merging attention states over disjoint keys (FlashAttention's rescaling, Dao et al., 2022): the op `merge_states`,
and the last step of an attention that was split over its context. Knows no cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import MergeProblem
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.kernels.rowwise import gapless
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

VALUES = 4096
"""Values of a tile of parts that a program holds in registers."""
INTERPRETED_VALUES = 1 << 20
"""The same in the interpreter, where every program costs milliseconds."""
PROGRAMS = 512
"""Programs that are wanted before one takes several states."""
WIDEST = 1024
"""Values of a state that one program holds."""


@triton.jit
def merge_kernel(
    out_ptr, lse_ptr, parts_ptr, logs_ptr, sinks_ptr, states, parts, HEADS: tl.constexpr, DIM: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, ALL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts [n, R, D], logs f32[n, R], sinks [H] -> out [R, D], lse f32[R]; R = T * H. ALL >= n is a power of two."""
    state = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = state < states
    # ---- the peak of all parts, by which weights are scaled
    part = tl.arange(0, ALL)
    held = (part < parts)[:, None] & inside[None, :]
    logs = tl.load(logs_ptr + part[:, None].to(tl.int64) * states + state[None, :], held, float("-inf"))
    top = tl.max(logs, 0)
    blind = top == float("-inf")
    peak = top
    if SINKS:
        sink = tl.load(sinks_ptr + state % HEADS, inside, 0.0).to(tl.float32)
        peak = tl.maximum(peak, sink)
    peak = tl.where(blind, 0.0, peak)
    whole = tl.sum(tl.exp(logs - peak[None, :]), 0)
    whole = tl.where(blind, 1.0, whole)
    if LSE:
        tl.store(lse_ptr + state, tl.where(blind, float("-inf"), peak + tl.log(whole)), inside)
    if SINKS:
        whole += tl.exp(sink - peak)
    # ---- their weighted sum; a part that saw no key is not read
    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, parts, BLOCK_P):
        some = first + tl.arange(0, BLOCK_P)
        row = some[:, None].to(tl.int64) * states + state[None, :]
        log = tl.load(logs_ptr + row, (some < parts)[:, None] & inside[None, :], float("-inf"))
        read = (log > float("-inf"))[:, :, None] & (dim < DIM)[None, None, :]
        values = tl.load(parts_ptr + row[:, :, None] * DIM + dim[None, None, :], read, 0.0).to(tl.float32)
        total += tl.sum(values * tl.exp(log - peak[None, :])[:, :, None], 0)
    total = tl.where(blind[:, None], 0.0, total / whole[:, None])
    where = state[:, None].to(tl.int64) * DIM + dim[None, :]
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), inside[:, None] & (dim < DIM)[None, :])


def config(parts: int, states: int, dim: int) -> Config:
    """How many states and parts a program takes at once, so that there are enough programs and none spills."""
    values = INTERPRETED_VALUES if interpreting() else VALUES
    block_d = triton.next_power_of_2(dim)
    room = max(values // block_d, 1)
    wanted = triton.next_power_of_2(max(states, 1)) if interpreting() else max(states // PROGRAMS, 1)
    block_r = 1 << (min(wanted, room, 256).bit_length() - 1)
    block_p = min(triton.next_power_of_2(max(parts, 1)), max(room // block_r, 1))
    return Config({"BLOCK_P": block_p, "BLOCK_R": block_r, "BLOCK_D": block_d}, num_warps=4, num_stages=1)


def merge(
    session: Any,
    parts: torch.Tensor,
    logs: torch.Tensor,
    out: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """parts [n, T, H, D], logs f32[n, T, H] over disjoint keys -> out [T, H, D] and, if given, lse f32[T, H].

    Sinks [H] join the denominator here, and not lse. States without a key are 0, with lse -inf.
    """
    count, tokens, heads, dim = parts.shape
    states = tokens * heads
    launch(
        session, merge_kernel, (triton.cdiv(states, (chosen := config(count, states, dim)).block["BLOCK_R"]),), chosen,
        out, out if lse is None else lse, parts, logs, out if sinks is None else gapless(sinks), states, count,
        HEADS=heads, DIM=dim, SINKS=sinks is not None, LSE=lse is not None, ALL=triton.next_power_of_2(max(count, 1)),
    )  # fmt: skip
    return out


def supports(problem: MergeProblem) -> str | None:
    if problem.dtype == "float64":
        return "accumulates in float32, which is too narrow for float64"
    if problem.v_dim > WIDEST:
        return f"holds states of at most {WIDEST} values, not {problem.v_dim}"
    return None


def bind_merge(problem: MergeProblem, session: Any) -> Callable[..., torch.Tensor]:
    def merge_states(
        parts: torch.Tensor, lse: torch.Tensor, *, sinks: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """parts [n, T, H, D], lse f32[n, T, H], sinks [H] -> [T, H, D]; sinks count once, an all-empty state is 0."""
        target = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device) if out is None else out
        return merge(session, gapless(parts), gapless(lse), target, sinks=sinks)

    return merge_states


def recipes(where: Target) -> list[Recipe]:
    return [
        recipe(
            "triton_merge_states", "merge_states", bind_merge, out=True, priority=TRITON, handles=frozenset({"sinks"}),
            supports=supports, options={"target": where.name},
        )
    ]  # fmt: skip
