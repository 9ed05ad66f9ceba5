"""Ragged paged attention: decode, chunks of prefill and mixtures of both in one kernel.

Query tokens lie in fixed blocks of matrix rows, [group query heads of a key head] x tokens. The grid goes over *pairs*
of a sequence and a block that holds some of its tokens; per pair, a loop over blocks of keys keeps a running softmax
(Milakov and Gimelshein, 2018; Dao et al., 2022). Pages come from HBM into two buffers in turn, one being filled while
the other is read, from pair to pair without a stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineshaft_contract.problems import AttendProblem
from lineshaft_tpu.chips import Chip
from lineshaft_tpu.pallas.attend_blocks import Blocks, blocks
from lineshaft_tpu.tiling import LANES, usable_vmem

Array = jax.Array

LOWEST = -2.0e38
"""Stands for a score that is masked: finite, so that differences of two are no NaN."""


def attend(
    problem: AttendProblem,
    chip: Chip,
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    query_starts: Array,
    page_table: Array,
    context_lens: Array,
    *,
    sinks: Array | None = None,
    interpret: Any = False,
) -> Array | tuple[Array, Array]:
    """Attention of a ragged batch over pages.

    q [T, Hq, D] of problem.dtype; k_pages [N, Hkv, page, Dp], v_pages [N, Hkv, page, Dvp] of problem.kv_dtype, or None
    where values are the first v_dim of the keys; query_starts int32[B+1], page_table int32[B, P], context_lens
    int32[B]; sinks [Hq]. Returns [T, Hq, Dv] of q's dtype, and lse f32[T, Hq] if the problem asks for it. Exactly 0,
    and lse -inf, for tokens of no sequence and for a query that sees no key.
    """
    sizes = blocks(problem, chip)
    tokens, heads = q.shape[:2]
    count = -(-tokens // sizes.tokens)
    pairs = _pairs(query_starts, sizes.tokens, count)
    scalars = (*pairs, query_starts, page_table.reshape(-1), context_lens)
    arrays = [_packed(q, problem.kv_heads, count * sizes.rows, k_pages.shape[-1])]
    if sinks is not None:
        arrays.append(_sink_rows(sinks, sizes, problem.kv_heads))
    arrays += [k_pages] if v_pages is None else [k_pages, v_pages]
    static = _Static(problem, sizes, chip, page_table.shape[1], v_pages is None, sinks is not None)
    found = _call(static, scalars, arrays, interpret)
    held = jnp.arange(tokens) < query_starts[-1]
    out = _unpacked(found[0], tokens, heads)[..., : problem.v_dim]
    out = jnp.where(held[:, None, None], out, 0)
    if not problem.return_lse:
        return out
    return out, jnp.where(held[:, None], _unpacked(found[1], tokens, heads)[..., 0], -jnp.inf)


# ---- around the kernel -----------------------------------------------------------------------------------------


def _pairs(query_starts: Array, tokens: int, count: int) -> tuple[Array, Array, Array]:
    """(sequence int32[n], block int32[n], how many int32[1]) of each sequence with each of the `count` blocks of
    `tokens` tokens that it has queries in, in order; n is the most there can be. Those past the last repeat it."""
    starts, stops = query_starts[:-1], query_starts[1:]
    first = starts // tokens
    each = jnp.where(stops > starts, (stops - 1) // tokens - first + 1, 0)
    ends = jnp.cumsum(each)
    pair = jnp.minimum(jnp.arange(len(starts) + count), jnp.maximum(ends[-1] - 1, 0))
    row = jnp.minimum(jnp.sum(ends[None, :] <= pair[:, None], axis=1), len(starts) - 1)
    block = jnp.clip(first[row] + pair - (ends[row] - each[row]), 0, count - 1)
    return row.astype(jnp.int32), block.astype(jnp.int32), ends[-1:].astype(jnp.int32)


def _packed(q: Array, kv_heads: int, rows: int, dim: int) -> Array:
    """q [T, Hq, D] -> [Hkv, rows, dim]: row t * group + g is query head g of its key head at token t; padded with 0."""
    tokens, heads, held = q.shape
    by_head = q.reshape(tokens, kv_heads, heads // kv_heads, held).transpose(1, 0, 2, 3)
    flat = by_head.reshape(kv_heads, -1, held)
    return jnp.pad(flat, ((0, 0), (0, rows - flat.shape[1]), (0, dim - held)))


def _unpacked(out: Array, tokens: int, heads: int) -> Array:
    """[Hkv, rows, dim] -> [T, Hq, dim]."""
    kv_heads, _, dim = out.shape
    group = heads // kv_heads
    by_head = out[:, : tokens * group].reshape(kv_heads, tokens, group, dim)
    return by_head.transpose(1, 0, 2, 3).reshape(tokens, heads, dim)


def _sink_rows(sinks: Array, sizes: Blocks, kv_heads: int) -> Array:
    """sinks [Hq] -> f32[Hkv, rows, LANES]: the sink of each matrix row of a block."""
    rows = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, sizes.group), (1, sizes.tokens))
    return jnp.broadcast_to(rows[..., None], (*rows.shape, LANES))


# ---- the call --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Static:
    """What a kernel is compiled for."""

    problem: AttendProblem
    sizes: Blocks
    chip: Chip
    columns: int  # of the page table
    value_in_key: bool
    sinks: bool

    @property
    def keys(self) -> int:
        """Keys of a block."""
        return self.sizes.pages * self.problem.page_size


class _Refs(NamedTuple):
    """Where a kernel is and what it reads and writes: scalars, blocks, pages in HBM, results, and what lasts."""

    first_head: Any  # of the grid step
    index: Any  # of the pair
    rows: Any  # int32[n], sequence of each pair
    blocks: Any  # int32[n], block of queries of each pair
    count: Any  # int32[1]
    starts: Any  # int32[B+1]
    table: Any  # int32[B*P]
    lens: Any  # int32[B]
    q: Any  # [heads, rows, D]
    sinks: Any  # f32[heads, rows, LANES] or None
    pages: tuple[Any, ...]  # k, and v if it is held apart
    out: Any  # [heads, rows, Dv]
    lse: Any  # f32[heads, rows, LANES] or None
    buffers: tuple[Any, ...]  # [2, heads, pages, page, D] for each of `pages`
    peak: Any  # f32[heads, rows, LANES]
    total: Any  # f32[heads, rows, LANES]
    acc: Any  # f32[heads, rows, Dv]
    next: Any  # int32[1]: the buffer that the next block of keys goes into
    live: Any  # int32[2]: per buffer, a bit for each page that was fetched
    arrived: Any  # semaphores [2, len(pages)]


def _call(static: _Static, scalars: tuple[Array, ...], arrays: list[Array], interpret: Any) -> Any:
    problem, sizes = static.problem, static.sizes
    q, pages = arrays[0], arrays[2:] if static.sinks else arrays[1:]
    dim, v_dim = q.shape[-1], pages[-1].shape[-1]

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((sizes.heads, sizes.rows, width), lambda head, pair, rows, at, *_: (head, at[pair], 0))

    sinks = [pl.BlockSpec((sizes.heads, sizes.rows, LANES), lambda head, *_: (head, 0, 0))] if static.sinks else []
    state = [pltpu.VMEM((sizes.heads, sizes.rows, width), jnp.float32) for width in (LANES, LANES, v_dim)]
    buffers = [pltpu.VMEM((2, sizes.heads, sizes.pages, *p.shape[2:]), p.dtype) for p in pages]
    shapes = [jax.ShapeDtypeStruct((*q.shape[:2], v_dim), q.dtype)]
    if problem.return_lse:
        shapes.append(jax.ShapeDtypeStruct((*q.shape[:2], LANES), jnp.float32))
    return pl.pallas_call(
        _kernel(static, len(pages)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(problem.kv_heads // sizes.heads, scalars[0].shape[0]),
            in_specs=[block(dim), *sinks, *[pl.BlockSpec(memory_space=pl.ANY)] * len(pages)],
            out_specs=[block(shape.shape[-1]) for shape in shapes],
            scratch_shapes=[
                *buffers, *state, pltpu.SMEM((1,), jnp.int32), pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, len(pages))),
            ],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=usable_vmem(static.chip)
        ),
        interpret=interpret,
        name="lineshaft_attend",
    )(*scalars, *arrays)  # fmt: skip


def _kernel(static: _Static, page_arrays: int) -> Callable[..., None]:
    """The kernel as it is called: with references in order, and none for what the problem has not."""

    def run(*refs: Any) -> None:
        given = iter(refs)
        parts: list[Any] = [pl.program_id(0) * static.sizes.heads, pl.program_id(1)]
        parts += [next(given) for _ in range(6)]
        parts += [next(given), next(given) if static.sinks else None]
        parts += [tuple(next(given) for _ in range(page_arrays))]
        parts += [next(given), next(given) if static.problem.return_lse else None]
        parts += [tuple(next(given) for _ in range(page_arrays)), *given]
        _step(static, _Refs(*parts))

    return run


# ---- the kernel ------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """A sequence's queries in a block, in scalars: tokens `low` to `high`, at positions `shift` + token, and the keys
    that any of them sees: positions `first` to `end`, which begin in block `key_block` of keys."""

    row: Any
    block: Any
    low: Any
    high: Any
    shift: Any
    context: Any
    first: Any
    end: Any
    key_block: Any
    key_blocks: Any  # at least 1


def _pair(static: _Static, refs: _Refs, index: Any) -> _Pair:
    problem, tokens = static.problem, static.sizes.tokens
    row, block = refs.rows[index], refs.blocks[index]
    start, stop, context = refs.starts[row], refs.starts[row + 1], refs.lens[row]
    low, high = jnp.maximum(start, block * tokens), jnp.minimum(stop, (block + 1) * tokens)
    shift = context - stop
    end = jnp.minimum(context, shift + high) if problem.causal else context
    first = jnp.maximum(shift + low - problem.window + 1, 0) if problem.window else jnp.int32(0)
    key_block = lax.div(first, jnp.int32(static.keys))
    last = lax.div(jnp.maximum(end, 0) + (static.keys - 1), jnp.int32(static.keys))
    return _Pair(
        row, block, low, high, shift, context, first, end, key_block, jnp.maximum(last - key_block, 1)
    )  # fmt: skip


def _step(static: _Static, refs: _Refs) -> None:
    """One pair: its blocks of keys in turn, each fetched while the one before is worked on."""
    index = refs.index

    @pl.when(index == 0)
    def _() -> None:
        refs.next[0] = 0

    @pl.when(index < refs.count[0])
    def _() -> None:
        pair = _pair(static, refs, index)

        @pl.when(index == 0)
        def _() -> None:
            _fetch(static, refs, pair, jnp.int32(0), jnp.int32(0))

        def work(j: Any, buffer: Any) -> Any:
            _fetch_next(static, refs, pair, j, 1 - buffer)
            _arrive(static, refs, buffer)
            _clean(static, refs, pair, j, buffer)
            _attend_block(static, refs, pair, j, buffer)
            return 1 - buffer

        refs.next[0] = lax.fori_loop(jnp.int32(0), pair.key_blocks, work, refs.next[0])


def _fetch_next(static: _Static, refs: _Refs, pair: _Pair, j: Any, buffer: Any) -> None:
    """Start fetching what comes after block j of `pair`: its next, or the first of the next pair."""
    index = refs.index

    @pl.when(j + 1 < pair.key_blocks)
    def _() -> None:
        _fetch(static, refs, pair, j + 1, buffer)

    @pl.when((j + 1 == pair.key_blocks) & (index + 1 < refs.count[0]))
    def _() -> None:
        _fetch(static, refs, _pair(static, refs, index + 1), jnp.int32(0), buffer)


def _fetch(static: _Static, refs: _Refs, pair: _Pair, j: Any, buffer: Any) -> None:
    """Start copying those pages of the pair's block j of keys that hold a visible key."""
    page, pages = static.problem.page_size, static.sizes.pages
    start = (pair.key_block + j) * pages
    low = jnp.maximum(start, lax.div(pair.first, jnp.int32(page)))
    high = jnp.minimum(start + pages, lax.div(jnp.maximum(pair.end, 0) + (page - 1), jnp.int32(page)))

    def one(column: Any, live: Any) -> Any:
        held = refs.table[pair.row * static.columns + column]

        @pl.when(held != 0)
        def _() -> None:
            for copy in _copies(static, refs, held, buffer, column - start):
                copy.start()

        return live | jnp.where(held != 0, jnp.left_shift(jnp.int32(1), column - start), 0)

    refs.live[buffer] = lax.fori_loop(low, high, one, jnp.int32(0))


def _arrive(static: _Static, refs: _Refs, buffer: Any) -> None:
    """Wait for the pages that were started into a buffer."""

    def one(place: Any, live: Any) -> Any:
        @pl.when(live & 1 == 1)
        def _() -> None:
            for copy in _copies(static, refs, jnp.int32(0), buffer, place):
                copy.wait()

        return lax.shift_right_logical(live, jnp.int32(1))

    lax.fori_loop(0, static.sizes.pages, one, refs.live[buffer])


def _copies(static: _Static, refs: _Refs, page: Any, buffer: Any, place: Any) -> list[Any]:
    heads = pl.ds(refs.first_head, static.sizes.heads)
    return [
        pltpu.make_async_copy(pages.at[page, heads], to.at[buffer, :, place], refs.arrived.at[buffer, n])
        for n, (pages, to) in enumerate(zip(refs.pages, refs.buffers, strict=True))
    ]


def _clean(static: _Static, refs: _Refs, pair: _Pair, j: Any, buffer: Any) -> None:
    """Put 0 where a buffer holds values that no query of the pair sees, as 0 times NaN is NaN."""
    values, page, pages = refs.buffers[-1], static.problem.page_size, static.sizes.pages
    start, live = (pair.key_block + j) * static.keys, refs.live[buffer]

    def one(place: Any, carry: None) -> None:
        at, held = start + place * page, lax.shift_right_logical(live, place) & 1

        @pl.when((held == 0) | (at < pair.first) | (at + page > pair.end))
        def _() -> None:
            old = values[buffer, :, place]
            key = at + lax.broadcasted_iota(jnp.int32, old.shape, 1)
            seen = (key >= pair.first) & (key < jnp.where(held == 1, pair.end, 0))
            values[buffer, :, place] = jnp.where(seen, old.astype(jnp.float32), 0).astype(old.dtype)

    full = -1 if pages == 32 else (1 << pages) - 1

    @pl.when((live != full) | (start < pair.first) | (start + static.keys > pair.end))
    def _() -> None:
        lax.fori_loop(0, pages, one, None)


def _attend_block(static: _Static, refs: _Refs, pair: _Pair, j: Any, buffer: Any) -> None:
    """Queries of the pair over one block of keys: in the small window if it holds them all, else in the whole block."""
    sizes = static.sizes
    low = (pair.low - pair.block * sizes.tokens) * sizes.group
    start = lax.div(low, jnp.int32(sizes.small)) * sizes.small
    fits = (pair.high - pair.low) * sizes.group + (low - start) <= sizes.small
    if sizes.small == sizes.rows:
        _attend_window(static, refs, pair, j, buffer, 0, sizes.rows)
        return

    @pl.when(fits)
    def _() -> None:
        _attend_window(static, refs, pair, j, buffer, pl.multiple_of(start, sizes.small), sizes.small)

    @pl.when(jnp.logical_not(fits))
    def _() -> None:
        _attend_window(static, refs, pair, j, buffer, 0, sizes.rows)


def _attend_window(static: _Static, refs: _Refs, pair: _Pair, j: Any, buffer: Any, start: Any, rows: int) -> None:
    """Matrix rows `start` to `start` + `rows` of the block of queries over block j of keys, head by head."""
    window = pl.ds(start, rows)
    token = _divided(start + lax.broadcasted_iota(jnp.int32, (rows, 1), 0), static.sizes.group)
    token = token + pair.block * static.sizes.tokens
    seen = _seen(static, refs, pair, j, buffer, token)
    mine = (token >= pair.low) & (token < pair.high)

    def one(head: Any, carry: None) -> None:
        @pl.when(j == 0)
        def _() -> None:
            refs.peak[head, window] = jnp.full((rows, LANES), LOWEST, jnp.float32)
            refs.total[head, window] = jnp.zeros((rows, LANES), jnp.float32)
            refs.acc[head, window] = jnp.zeros((rows, refs.acc.shape[-1]), jnp.float32)

        _accumulate(static, refs, head, window, buffer, seen)

        @pl.when(j + 1 == pair.key_blocks)
        def _() -> None:
            _finish(static, refs, head, window, mine)

    lax.fori_loop(0, static.sizes.heads, one, None)


def _seen(static: _Static, refs: _Refs, pair: _Pair, j: Any, buffer: Any, token: Any) -> Any:
    """bool[rows, keys]: which keys of block j each matrix row sees; token int32[rows, 1]."""
    problem = static.problem
    place = lax.broadcasted_iota(jnp.int32, (1, static.keys), 1)
    bit = lax.shift_right_logical(jnp.broadcast_to(refs.live[buffer], place.shape), _divided(place, problem.page_size))
    at = (pair.key_block + j) * static.keys + place
    at = jnp.where((bit & 1 == 1) & (at < pair.context), at, jnp.int32(2**30))
    position = pair.shift + token
    seen = at <= (position if problem.causal else jnp.int32(2**30 - 1))
    if not problem.causal:
        seen = jnp.broadcast_to(seen, (token.shape[0], static.keys))
    return seen & (at > position - problem.window) if problem.window else seen


def _divided(x: Any, by: int) -> Any:
    """x // by for int32 values from 0 to 2^20: a shift, or in float32, where a half keeps it off whole numbers."""
    if by & (by - 1) == 0:
        return lax.shift_right_logical(x, jnp.full(x.shape, by.bit_length() - 1, jnp.int32))
    return jnp.floor((x.astype(jnp.float32) + 0.5) * (1.0 / by)).astype(jnp.int32)


def _accumulate(static: _Static, refs: _Refs, head: Any, window: Any, buffer: Any, seen: Any) -> None:
    """Add one block of keys to the running softmax of a head."""
    q = refs.q[head, window]
    k = _keys(static, refs.buffers[0], buffer, head, q.dtype)
    v = k[:, : refs.acc.shape[-1]] if static.value_in_key else _keys(static, refs.buffers[1], buffer, head, q.dtype)
    scores = _dot(q, k, ((1,), (1,))) * static.problem.scale
    if static.problem.softcap:
        scores = static.problem.softcap * jnp.tanh(scores / static.problem.softcap)
    scores = jnp.where(seen, scores, LOWEST)
    before = refs.peak[head, window][:, :1]
    peak = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0)
    fade = jnp.exp(before - peak)
    total = refs.total[head, window][:, :1] * fade + jnp.sum(weights, axis=1, keepdims=True)
    refs.acc[head, window] = refs.acc[head, window] * fade + _dot(weights.astype(v.dtype), v, ((1,), (0,)))
    refs.peak[head, window] = jnp.broadcast_to(peak, (peak.shape[0], LANES))
    refs.total[head, window] = jnp.broadcast_to(total, (total.shape[0], LANES))


def _keys(static: _Static, held: Any, buffer: Any, head: Any, dtype: Any) -> Any:
    """Keys or values of one head in a buffer: [keys, D] in `dtype`."""
    found = held[buffer, head]
    return found.reshape(static.keys, found.shape[-1]).astype(dtype)


def _dot(x: Any, y: Any, dims: tuple[tuple[int], tuple[int]]) -> Any:
    """A product summed in float32: of bfloat16 as it is, of float32 without rounding its operands."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _finish(static: _Static, refs: _Refs, head: Any, window: Any, mine: Any) -> None:
    """Sinks, division, and the results of the pair's own matrix rows; 0 and -inf where nothing was seen."""
    peak, total, acc = refs.peak[head, window][:, :1], refs.total[head, window][:, :1], refs.acc[head, window]
    blind = total == 0
    if refs.lse is not None:
        lse = jnp.where(blind, -jnp.inf, peak + jnp.log(jnp.where(blind, 1, total)))
        old = refs.lse[head, window]
        refs.lse[head, window] = jnp.where(mine, jnp.broadcast_to(lse, old.shape), old)
    if refs.sinks is not None:
        sink = refs.sinks[head, window][:, :1]
        top = jnp.maximum(peak, sink)
        fade = jnp.exp(peak - top)
        total, acc = total * fade + jnp.exp(sink - top), acc * fade
    found = jnp.where(blind, 0, acc / jnp.where(blind, 1, total))
    old = refs.out[head, window]
    refs.out[head, window] = jnp.where(mine, found, old.astype(jnp.float32)).astype(old.dtype)
