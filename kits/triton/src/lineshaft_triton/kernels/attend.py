"""Attention of a ragged batch over a paged cache of the "slots" layout: one kernel, in tiles of queries and of keys.

Online softmax over tiles of keys (FlashAttention-2, Dao, 2023), keys and values read through the page table
(PagedAttention, Kwon et al., 2023), the context of a row split over several programs where a batch has too few of them
(Flash-Decoding, Dao et al., 2023). The rows of a tile are queries times the query heads of one key head, so that heads
which share keys share the matrix instruction. Tiles of each target are in `attend_tiles`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.pages import SLOTS_LAYOUT
from lineshaft_triton.kernels.attend_tiles import CHUNK, DECODE, FEW, splits, tile, unreadable
from lineshaft_triton.kernels.merge import merge
from lineshaft_triton.kernels.rowwise import gapless
from lineshaft_triton.kernels.write import dense_rows
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import SPECIAL, TRITON
from lineshaft_triton.targets import Target

FEATURES = frozenset({"causal", "window", "softcap", "sinks", "value_in_key", "return_lse"})
SMALLEST = 16
"""Rows, columns and depth of the smallest matrix instruction."""
WIDE_HEAD = 256
"""Head sizes above it are held in two parts, a power of two and what is left."""
MOST_ROWS = 1024
"""Entries of query_starts that a program looks through at once."""


@triton.jit
def pages_of(row_table, n, pages, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each key of tile n, or the one page of them all; some page for keys beyond the table."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(row_table + tl.minimum(n // (PAGE // BLOCK_N), pages - 1))
    else:
        page = tl.load(row_table + tl.minimum((n * BLOCK_N + tl.arange(0, BLOCK_N)) // PAGE, pages - 1))
    return page


@triton.jit
def cells(at, seen, d, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Keys or values [BLOCK_N, D] at pointers `at`, 0 where they are not seen: what lies there may be NaN."""
    there = seen[:, None] if DIM == BLOCK else seen[:, None] & (d < DIM)[None, :]
    return tl.load(at, there, 0.0)


@triton.jit
def tanh(x):
    """Of float32, within 3e-7 of itself: by exp, but near 0, where its two terms cancel, by the polynomial
    y + y^3 p(y^2) that is nearest to it below 0.6 (least squares of the relative error). The one that counts is chosen
    by a weight of 0 or 1: a mask for each score would not fit into the scalar registers of AMD's GPUs."""
    y = tl.minimum(tl.maximum(x, -1.0), 1.0)
    z = y * y
    p = ((0.0155800991 * z - 0.0521883993) * z + 0.133125984) * z - 0.333325636
    far = tl.minimum(tl.maximum(z * 1e9 - 0.36e9, 0.0), 1.0)
    return far * (1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)) + (1.0 - far) * (y + y * z * p)


@triton.jit
def attend_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, starts_ptr, sinks_ptr, q_stride, tokens, rows, pages,
    scale, softcap, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, QK_DIM: tl.constexpr, V_DIM: tl.constexpr,
    PAGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    SHARED: tl.constexpr, LSE: tl.constexpr, SPLITS: tl.constexpr, DECODE: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, TAIL_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one row, for up to BLOCK_G heads of one key head, over one split of the row's keys.

    q [T, Hq, D] with rows `q_stride` apart, k [N * PAGE, Hkv, D], v [N * PAGE, Hkv, Dv] (SHARED: the first values of
    k), table int32[B, P], lens int32[B], starts int32[B + 1], sinks [Hq] -> out [T, Hq, Dv], lse f32[T, Hq]; with
    SPLITS > 1 both are float32 and have a leading dim of splits, and sinks wait for the merge.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // BLOCK_G
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    HEADS: tl.constexpr = GROUP * KV_HEADS
    program, split = tl.program_id(0), tl.program_id(1)
    if DECODE:  # heads of a token run beside each other, as their keys lie beside each other
        tile, block = program // (KV_HEADS * HEAD_BLOCKS), program % (KV_HEADS * HEAD_BLOCKS)
    else:  # tiles that share keys do
        tiles = tl.num_programs(0) // (KV_HEADS * HEAD_BLOCKS)
        tile, block = program % tiles, program // tiles
    kv_head = block // HEAD_BLOCKS
    first_head = (block % HEAD_BLOCKS) * BLOCK_G

    # ---- the row of the tile, its first token, and that token's position; padding tokens are a row without keys
    live = tl.load(starts_ptr + rows)
    if DECODE:  # one tile a row; the n-th row without a query takes the n-th padding token
        row = tile
        first = tl.load(starts_ptr + tl.minimum(row, rows))
        padding = tl.load(starts_ptr + tl.minimum(row + 1, rows)) == first
        token = tl.where(padding, live + row - first, first)
        stop = tl.minimum(token + 1, tokens)
    else:  # row b owns the tiles from starts[b] // BLOCK_Q + b on
        row = -1
        for b in range(0, rows + 1, BLOCK_B):
            at = b + tl.arange(0, BLOCK_B)
            bound = tl.load(starts_ptr + at, at <= rows, 0) // BLOCK_Q + at
            row += tl.sum(((at <= rows) & (bound <= tile)).to(tl.int32), 0)
        first = tl.load(starts_ptr + row)
        padding = row == rows
        stop = tl.where(padding, tokens, tl.load(starts_ptr + tl.minimum(row + 1, rows)))
        token = first + (tile - first // BLOCK_Q - row) * BLOCK_Q
    if token >= stop:
        return
    row = tl.minimum(row, rows - 1)
    context = tl.where(padding, 0, tl.load(lens_ptr + row))
    position = context - 1 if DECODE else context - stop + token

    # ---- queries
    m = tl.arange(0, BLOCK_M)
    query = m // BLOCK_G
    head = first_head + m % BLOCK_G
    wanted = (query < BLOCK_Q) & (token + query < stop) & (head < GROUP)
    head += kv_head * GROUP
    d = tl.arange(0, BLOCK_D)
    q_row = q_ptr + (token + query).to(tl.int64)[:, None] * q_stride + head[:, None] * QK_DIM
    q = tl.load(q_row + d[None, :], wanted[:, None] & (d < QK_DIM)[None, :], 0.0)
    if TAIL_D:
        tail = BLOCK_D + tl.arange(0, TAIL_D)
        q_tail = tl.load(q_row + tail[None, :], wanted[:, None] & (tail < QK_DIM)[None, :], 0.0)

    # ---- the keys that any query of the tile sees, and this split's tiles of them
    lowest, highest = 0, context
    if CAUSAL:
        highest = tl.minimum(context, position + tl.minimum(BLOCK_Q, stop - token))
    if WINDOW:
        lowest = tl.maximum(0, position - WINDOW + 1)
    begin, end = lowest // BLOCK_N, tl.cdiv(tl.maximum(highest, 0), BLOCK_N)
    if SPLITS > 1:
        share = tl.cdiv(end - begin, SPLITS)
        begin += split * share
        end = tl.minimum(end, begin + share)

    # ---- online softmax
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    dv = tl.arange(0, BLOCK_V)
    row_table = table_ptr + row.to(tl.int64) * pages
    page = pages_of(row_table, begin, pages, PAGE, BLOCK_N)
    for n in range(begin, end):
        at = n * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = (at >= lowest) & (at < tl.where(page != 0, highest, 0))  # page 0 holds no key
        slot = (page.to(tl.int64) * PAGE + at % PAGE) * KV_HEADS + kv_head
        page = pages_of(row_table, n + 1, pages, PAGE, BLOCK_N)  # of the next tile, whose keys wait for it
        k_row = k_ptr + slot[:, None] * QK_DIM
        k = cells(k_row + d[None, :], seen, d, QK_DIM, BLOCK_D).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAIL_D:
            k_tail = cells(k_row + tail[None, :], seen, tail, QK_DIM, BLOCK_D + TAIL_D).to(q.dtype)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        scores = scores * scale
        if SOFTCAP:
            scores = softcap * tanh(scores * (1.0 / softcap))
        visible = seen[None, :]
        if not DECODE:
            if CAUSAL:
                visible = visible & (at[None, :] <= (position + query)[:, None])
            if WINDOW:
                visible = visible & (at[None, :] > (position + query - WINDOW)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(peak - base)
        peak = new
        total = total * fade + tl.sum(weights, 1)
        if SHARED:
            v = k
        else:
            v_row = v_ptr + slot[:, None] * V_DIM
            v = cells(v_row + dv[None, :], seen, dv, V_DIM, BLOCK_V).to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")

    # ---- out
    blind = peak == float("-inf")
    total = tl.where(blind, 1.0, total)
    base = tl.where(blind, 0.0, peak)
    state = (token + query).to(tl.int64) * HEADS + head
    if SPLITS > 1:
        state += split.to(tl.int64) * tokens * HEADS
    if LSE:
        tl.store(lse_ptr + state, tl.where(blind, float("-inf"), base + tl.log(total)), wanted)
    if SINKS:
        sink = tl.load(sinks_ptr + head, wanted, 0.0).to(tl.float32)
        base = tl.where(blind, 0.0, tl.maximum(peak, sink))
        fade = tl.exp(peak - base)
        acc = acc * fade[:, None]
        total = total * fade + tl.exp(sink - base)
    out = tl.where(blind[:, None], 0.0, acc / total[:, None])
    if SPLITS > 1:
        wanted = wanted & (peak != float("-inf"))
    out_at = out_ptr + state[:, None] * V_DIM + dv[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), wanted[:, None] & (dv < V_DIM)[None, :])


@dataclass(frozen=True)
class Plan:
    """How a problem is cut up: everything follows from the bucket, so that a launch can be captured.

    config     tiles, warps and stages
    tiles      of queries
    heads      blocks of heads
    splits     of the keys
    constexprs what the kernel is compiled for, besides the features of the problem
    """

    config: Config
    tiles: int
    heads: int
    splits: int
    constexprs: Mapping[str, int]

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles * self.heads, self.splits


def head_blocks(problem: AttendProblem) -> tuple[int, int, int]:
    """(BLOCK_D, TAIL_D, BLOCK_V): powers of two that hold a key's and a value's head."""

    def padded(dim: int) -> int:
        return max(triton.next_power_of_2(dim), SMALLEST) if dim else 0

    main = problem.qk_dim
    if main > WIDE_HEAD:
        main = 1 << (main.bit_length() - 1)
    return padded(main), padded(problem.qk_dim - main), padded(problem.v_dim)


def tile_of(where: Target, kind: str, problem: AttendProblem) -> Config | None:
    """The tile for a problem's heads: a small one too where rows have few queries."""
    block_d, tail, block_v = head_blocks(problem)
    queries = problem.max_query * (problem.q_heads // problem.kv_heads)
    if kind == CHUNK and 0 < queries <= SMALLEST:
        kind = FEW
    return tile(where, kind, problem.dtype, max(block_d + tail, block_v))


def plan(where: Target, kind: str, problem: AttendProblem, config: Config) -> Plan:
    group = problem.q_heads // problem.kv_heads
    block_g = min(group, config.block["BLOCK_M"])
    queries = config.block["BLOCK_M"] // block_g
    tiles = max(problem.rows, problem.tokens) if kind == DECODE else problem.tokens // queries + problem.rows + 1
    heads = problem.kv_heads * triton.cdiv(group, block_g)
    keys = problem.pages * problem.page_size
    if problem.window:
        keys = min(keys, problem.window + queries)
    block_d, tail, block_v = head_blocks(problem)
    constexprs = {
        "GROUP": group, "BLOCK_G": block_g, "BLOCK_D": block_d, "TAIL_D": tail, "BLOCK_V": block_v,
        "BLOCK_B": min(triton.next_power_of_2(problem.rows + 1), MOST_ROWS), "DECODE": kind == DECODE,
    }  # fmt: skip
    return Plan(config, tiles, heads, splits(where, config, tiles * heads, keys), constexprs)


def supports(where: Target, kind: str, problem: AttendProblem) -> str | None:
    if problem.dtype == "float64":
        return "accumulates in float32, which is too narrow for float64"
    if kind == DECODE and problem.max_query != 1:
        return f"takes steps of one query a row, not of {problem.max_query}"
    block_d, tail, block_v = head_blocks(problem)
    if tail and not problem.value_in_key:
        return f"takes keys of at most {WIDE_HEAD} values, or more where values are part of them; not {problem.qk_dim}"
    if problem.value_in_key and block_v != block_d:
        return f"takes values of {problem.v_dim} in keys of {problem.qk_dim} only where one power of two holds both"
    if tile_of(where, kind, problem) is None:
        return f"has no tile for heads of {problem.qk_dim} and {problem.v_dim} in {problem.dtype} on {where.name}"
    return unreadable(where, problem)


def bind_attend(where: Target, kind: str, problem: AttendProblem, session: Any) -> Any:
    config = tile_of(where, kind, problem)
    assert config is not None, "supports() has found a tile"
    chosen = plan(where, kind, problem, config)
    features = {
        "KV_HEADS": problem.kv_heads, "QK_DIM": problem.qk_dim, "V_DIM": problem.v_dim, "PAGE": problem.page_size,
        "CAUSAL": problem.causal, "WINDOW": problem.window, "SOFTCAP": problem.softcap != 0.0,
        "SHARED": problem.value_in_key, "SPLITS": chosen.splits,
    }  # fmt: skip
    constexprs: dict[str, Any] = {**chosen.constexprs, **features}
    expects = where.expects(problem.dtype, config.unit)

    def run(out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, cache: Cache, step: StepInputs, **more: Any) -> None:
        view, k, sinks = step.groups[problem.group], cache.arrays["k"], more.pop("sinks", q)
        launch(
            session, attend_kernel, chosen.grid, config, out, lse, q, k, cache.arrays.get("v", k), view.page_table,
            view.context_lens, step.query_starts, sinks, q.stride(0), q.shape[0], problem.rows, problem.pages,
            problem.scale, problem.softcap, expects=expects, **more, **constexprs,
        )  # fmt: skip

    def attend(
        q: torch.Tensor, cache: Cache, step: StepInputs, *, sinks: torch.Tensor | None = None, out: Any = None
    ) -> Any:
        """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse f32[T, Hq])."""
        q = dense_rows(q)
        result, lse = _results(problem, q, out)
        if chosen.splits == 1:
            given = {} if sinks is None else {"sinks": gapless(sinks)}
            run(result, result if lse is None else lse, q, cache, step, LSE=lse is not None, SINKS=bool(given), **given)
        else:
            parts, logs = partials(session, chosen.splits, result)
            run(parts, logs, q, cache, step, LSE=True, SINKS=False)
            merge(session, parts, logs, result, sinks=sinks, lse=lse)
        return result if lse is None else (result, lse)

    return attend


def _results(problem: AttendProblem, q: torch.Tensor, out: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out [T, Hq, Dv], lse f32[T, Hq] or None): those given, or new ones."""
    if out is not None:
        return out if problem.return_lse else (out, None)
    shape = q.shape[0], problem.q_heads
    result = torch.empty((*shape, problem.v_dim), dtype=q.dtype, device=q.device)
    return result, torch.empty(shape, dtype=torch.float32, device=q.device) if problem.return_lse else None


def partials(session: Any, count: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(parts f32[n, T, H, Dv], logs f32[n, T, H]) in a workspace of the session, which all its programs share: they
    run one at a time, and what one leaves there no other reads."""
    states = count * out.shape[0] * out.shape[1]
    values = states * out.shape[2]
    size = triton.next_power_of_2(values + states)
    space = session.constant(
        ("attend_partials", size), lambda: torch.empty(size, dtype=torch.float32, device=out.device)
    )
    return space[:values].view(count, *out.shape), space[values : values + states].view(count, *out.shape[:2])


def recipes(where: Target) -> list[Recipe]:
    def made(kind: str, priority: int) -> Recipe:
        return recipe(
            f"triton_attend_{kind}", "attend", partial(bind_attend, where, kind), out=True, layout=SLOTS_LAYOUT,
            priority=priority, handles=FEATURES, supports=partial(supports, where, kind),
            options={"target": where.name},
        )  # fmt: skip

    return [made(DECODE, SPECIAL), made(CHUNK, TRITON)]
