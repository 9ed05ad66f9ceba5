"""Rotary embeddings (Su et al., 2021) from the torch kit's table of angles: alone, and with the rotated keys and their
values written to a cache of the "slots" layout in the same launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import RopeProblem, RopeWriteProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.kernels.rope import shared_table
from lineshaft_torch.kernels.rope import supports as known_angles
from lineshaft_torch.pages import SLOTS_LAYOUT
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.kernels.codes import CODES, storable, stored, stored_view
from lineshaft_triton.kernels.rowwise import gapless
from lineshaft_triton.kernels.write import dense_rows
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

Pair = tuple[torch.Tensor, torch.Tensor]

FEATURES = frozenset({"interleaved", "attention_factor"})
VALUES = 1024
"""Values of heads that a program turns."""
INTERPRETED_VALUES = 1 << 18
WIDEST = 1024
"""Values of a head that a program holds."""


@triton.jit
def rope_kernel(
    q_out, k_out, v_out, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, tokens, q_stride, k_stride,
    v_stride, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD: tl.constexpr, V_HEAD: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WRITE: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr,
    BIAS: tl.constexpr, NAN: tl.constexpr, INF: tl.constexpr, UNSIGNED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Some tokens' heads, of q in the first programs of the second dim and of k in the others.

    q [T, Q_HEADS, HEAD], k [T, K_HEADS, HEAD], v [T, K_HEADS, V_HEAD] with rows at strides, cos and sin
    f32[positions, HALF] -> q_out as q; k_out and v_out with WRITE pages by slot, else k_out as k and v unused.
    """
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    block = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    row = token.to(tl.int64)
    # ---- angles [BLOCK_T, 1, BLOCK_D]
    pair = tl.arange(0, BLOCK_D)
    position = tl.load(positions_ptr + token, inside, 0).to(tl.int64)
    at = position[:, None, None] * HALF + pair[None, None, :]
    turned = inside[:, None, None] & (pair < HALF)[None, None, :]
    cos, sin = tl.load(cos_ptr + at, turned, 0.0), tl.load(sin_ptr + at, turned, 0.0)
    # ---- where the two values of a pair lie, and the rest of a head
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    rest = 2 * HALF + tl.arange(0, BLOCK_R)
    if block < Q_BLOCKS:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        there = (head < Q_HEADS)[None, :, None]
        source = q_ptr + row[:, None, None] * q_stride + head[None, :, None] * HEAD
        target = q_out + (row[:, None, None] * Q_HEADS + head[None, :, None]) * HEAD
        a = tl.load(source + first[None, None, :], turned & there, 0.0).to(tl.float32)
        b = tl.load(source + second[None, None, :], turned & there, 0.0).to(tl.float32)
        tl.store(target + first[None, None, :], (a * cos - b * sin).to(q_out.dtype.element_ty), turned & there)
        tl.store(target + second[None, None, :], (b * cos + a * sin).to(q_out.dtype.element_ty), turned & there)
        if 2 * HALF < HEAD:
            kept = inside[:, None, None] & there & (rest < HEAD)[None, None, :]
            tl.store(target + rest[None, None, :], tl.load(source + rest[None, None, :], kept, 0.0), kept)
    else:
        head = (block - Q_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        there = (head < K_HEADS)[None, :, None]
        out_row = row
        if WRITE:
            out_row = tl.load(slots_ptr + token, inside, 0).to(tl.int64)
        source = k_ptr + row[:, None, None] * k_stride + head[None, :, None] * HEAD
        state = out_row[:, None, None] * K_HEADS + head[None, :, None]
        target = k_out + state * HEAD
        a = tl.load(source + first[None, None, :], turned & there, 0.0).to(tl.float32)
        b = tl.load(source + second[None, None, :], turned & there, 0.0).to(tl.float32)
        x, y = a * cos - b * sin, b * cos + a * sin
        kind = k_out.dtype.element_ty
        if EXACT:
            x, y = x.to(kind), y.to(kind)
        else:
            x = stored(x, kind, TOP, MANTISSA, BIAS, NAN, INF, UNSIGNED)
            y = stored(y, kind, TOP, MANTISSA, BIAS, NAN, INF, UNSIGNED)
        tl.store(target + first[None, None, :], x, turned & there)
        tl.store(target + second[None, None, :], y, turned & there)
        if 2 * HALF < HEAD:
            kept = inside[:, None, None] & there & (rest < HEAD)[None, None, :]
            x = tl.load(source + rest[None, None, :], kept, 0.0)
            if not EXACT:
                x = stored(x.to(tl.float32), kind, TOP, MANTISSA, BIAS, NAN, INF, UNSIGNED)
            tl.store(target + rest[None, None, :], x, kept)
        if V_HEAD:
            dv = tl.arange(0, BLOCK_V)
            kept = inside[:, None, None] & there & (dv < V_HEAD)[None, None, :]
            v = tl.load(
                v_ptr + row[:, None, None] * v_stride + head[None, :, None] * V_HEAD + dv[None, None, :], kept, 0.0
            )
            if not EXACT:
                v = stored(v.to(tl.float32), kind, TOP, MANTISSA, BIAS, NAN, INF, UNSIGNED)
            tl.store(v_out + state * V_HEAD + dv[None, None, :], v, kept)


def config(problem: RopeProblem, v_head: int) -> Config:
    half, heads = problem.dim // 2, max(problem.q_heads, problem.kv_heads)
    block_d, block_r, block_v = (
        triton.next_power_of_2(max(n, 1)) for n in (half, problem.head_dim - problem.dim, v_head)
    )
    room = (INTERPRETED_VALUES if interpreting() else VALUES) // max(2 * block_d, block_r, block_v)
    block_h = min(triton.next_power_of_2(heads), max(room, 1), triton.next_power_of_2(problem.kv_heads) * 2)
    block_t = min(triton.next_power_of_2(max(problem.rows, 1)), max(room // block_h, 1))
    sizes = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_D": block_d, "BLOCK_R": block_r, "BLOCK_V": block_v}
    return Config(sizes, num_warps=4, num_stages=1)


def supports(problem: RopeProblem) -> str | None:
    if problem.dtype == "float64":
        return "computes in float32, which is too narrow for float64"
    if problem.head_dim > WIDEST:
        return f"holds heads of at most {WIDEST} values, not {problem.head_dim}"
    return known_angles(problem)


def supports_write(problem: RopeWriteProblem) -> str | None:
    return storable(problem.dtype, problem.kv_dtype) or supports(problem)


def _starter(problem: RopeProblem, session: Any, v_head: int, kv_dtype: str, write: bool) -> Any:
    """Starts the kernel of a problem on (q_out, k_out, v_out, q, k, v, positions, slots)."""
    chosen = config(problem, v_head)
    cos, sin = shared_table(problem, session)
    block_t, block_h = chosen.block["BLOCK_T"], chosen.block["BLOCK_H"]
    blocks = triton.cdiv(problem.q_heads, block_h) + triton.cdiv(problem.kv_heads, block_h)
    constexprs = {
        "Q_HEADS": problem.q_heads, "K_HEADS": problem.kv_heads, "HEAD": problem.head_dim, "V_HEAD": v_head,
        "HALF": problem.dim // 2, "INTERLEAVED": problem.interleaved, "WRITE": write,
        "EXACT": kv_dtype == problem.dtype, **CODES[kv_dtype].constexprs,
    }  # fmt: skip

    def start(outs: tuple[torch.Tensor, ...], q: Any, k: Any, v: Any, positions: Any, slots: Any) -> None:
        tokens = q.shape[0]
        launch(
            session, rope_kernel, (triton.cdiv(tokens, block_t), blocks), chosen, *outs, q, k, v, cos, sin,
            gapless(positions), gapless(slots), tokens, q.stride(0), k.stride(0), v.stride(0), **constexprs,
        )  # fmt: skip

    return start


def bind_rope(problem: RopeProblem, session: Any) -> Any:
    start = _starter(problem, session, 0, problem.dtype, write=False)

    def rope(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, *, out: Pair | None = None) -> Pair:
        """q [T, Hq, D], k [T, Hk, D], positions int32[T] -> both rotated."""
        q, k = dense_rows(q), dense_rows(k)
        turned = (_like(q), _like(k)) if out is None else out
        start((*turned, turned[1]), q, k, k, positions, positions)
        return turned

    return rope


def bind_rope_write(problem: RopeWriteProblem, session: Any) -> Any:
    start = _starter(problem, session, problem.v_dim, problem.kv_dtype, write=True)

    def rope_write_kv(
        cache: Cache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, positions: torch.Tensor,
        step: StepInputs, *, out: Any = None,
    ) -> tuple[torch.Tensor, Cache]:  # fmt: skip
        """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] or None -> (q rotated, the cache with k rotated and v)."""
        q, k = dense_rows(q), dense_rows(k)
        v = k if v is None else dense_rows(v)
        fresh = () if out is None else out if isinstance(out, tuple) else (out,)
        turned = fresh[0] if fresh else _like(q)
        if session.options.functional:
            cache = _copied(cache, fresh[1:])
        pages = {name: stored_view(array) for name, array in cache.arrays.items()}
        start((turned, pages["k"], pages.get("v", pages["k"])), q, k, v, positions, step.groups[problem.group].slots)
        return turned, cache

    return rope_write_kv


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _copied(cache: Cache, given: tuple[torch.Tensor, ...]) -> Cache:
    """A copy of the cache, in the tensors given for its arrays if there are any."""
    places = given or tuple(map(torch.empty_like, cache.arrays.values()))
    copies = (place.copy_(array) for place, array in zip(places, cache.arrays.values(), strict=True))
    return replace(cache, arrays=dict(zip(cache.arrays, copies, strict=True)))


def recipes(where: Target) -> list[Recipe]:
    common: dict[str, Any] = {
        "out": True, "priority": TRITON, "handles": FEATURES, "options": {"target": where.name},
    }  # fmt: skip
    return [
        recipe("triton_rope", "rope", bind_rope, supports=supports, **common),
        recipe(
            "triton_rope_write_kv", "rope_write_kv", bind_rope_write, layout=SLOTS_LAYOUT, supports=supports_write,
            **common,
        ),
    ]  # fmt: skip
