"""Writing keys and values into a cache of the "slots" layout, rounded as its pages hold them (`codes`)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.kernels.cache import consuming
from lineshaft_torch.pages import SLOTS_LAYOUT
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.kernels.codes import CODES, storable, stored, stored_view
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

VALUES = 1024
"""Values of keys, and as many of values, that a program stores: few, so that a step of few tokens has many programs."""
INTERPRETED_VALUES = 1 << 18


@triton.jit
def write_kernel(
    k_pages, v_pages, k_ptr, v_ptr, slots_ptr, tokens, k_stride, v_stride, K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr,
    INF: tl.constexpr, UNSIGNED: tl.constexpr, EXACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """k [T, K_WIDTH], v [T, V_WIDTH] to the slots of pages as wide; EXACT: they hold the same dtype."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = token < tokens
    slot = tl.load(slots_ptr + token, inside, 0).to(tl.int64)[:, None]
    row = token.to(tl.int64)[:, None]
    k_inside = inside[:, None] & (at < K_WIDTH)[None, :]
    k = tl.load(k_ptr + row * k_stride + at[None, :], k_inside, 0.0)
    if not EXACT:
        k = stored(k.to(tl.float32), k_pages.dtype.element_ty, TOP, MANTISSA, BIAS, NAN, INF, UNSIGNED)
    tl.store(k_pages + slot * K_WIDTH + at[None, :], k, k_inside)
    if V_WIDTH:
        v_inside = inside[:, None] & (at < V_WIDTH)[None, :]
        v = tl.load(v_ptr + row * v_stride + at[None, :], v_inside, 0.0)
        if not EXACT:
            v = stored(v.to(tl.float32), v_pages.dtype.element_ty, TOP, MANTISSA, BIAS, NAN, INF, UNSIGNED)
        tl.store(v_pages + slot * V_WIDTH + at[None, :], v, v_inside)


def config(tokens: int, width: int) -> Config:
    values = INTERPRETED_VALUES if interpreting() else VALUES
    block_w = min(triton.next_power_of_2(width), values)
    block_t = min(triton.next_power_of_2(max(tokens, 1)), max(values // block_w, 1))
    return Config({"BLOCK_T": block_t, "BLOCK_W": block_w}, num_warps=4, num_stages=1)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] itself where the heads of a token lie dense behind one another, else a dense copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) or x.is_contiguous() else x.contiguous()


def supports(problem: KVProblem) -> str | None:
    return storable(problem.dtype, problem.kv_dtype)


def bind_write(problem: KVProblem, session: Any) -> Any:
    widths = problem.kv_heads * problem.qk_dim, problem.kv_heads * problem.v_dim
    chosen = config(problem.rows, max(widths))
    constexprs = {
        "K_WIDTH": widths[0], "V_WIDTH": widths[1], "EXACT": problem.kv_dtype == problem.dtype,
        **CODES[problem.kv_dtype].constexprs,
    }  # fmt: skip

    def write_kv(known: KVProblem, cache: Cache, k: torch.Tensor, v: torch.Tensor | None, step: StepInputs) -> Cache:
        """k [T, Hkv, D], v [T, Hkv, Dv] or None -> the cache with both at the group's slots."""
        k = dense_rows(k)
        v = k if v is None else dense_rows(v)
        pages = {name: stored_view(array) for name, array in cache.arrays.items()}
        grid = triton.cdiv(k.shape[0], chosen.block["BLOCK_T"]), triton.cdiv(max(widths), chosen.block["BLOCK_W"])
        launch(
            session, write_kernel, grid, chosen, pages["k"], pages.get("v", pages["k"]), k, v,
            step.groups[problem.group].slots, k.shape[0], k.stride(0), v.stride(0), **constexprs,
        )  # fmt: skip
        return cache

    return consuming(write_kv)(problem, session)


def recipes(where: Target) -> list[Recipe]:
    return [
        recipe(
            "triton_write_kv", "write_kv", bind_write, layout=SLOTS_LAYOUT, priority=TRITON, supports=supports,
            options={"target": where.name},
        )
    ]  # fmt: skip
