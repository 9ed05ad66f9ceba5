"""Writing keys and values into the pages of a cache, in place.

A token's row is smaller than a tile, and tiles are what a copy moves: a tile is read, the rows of all tokens that go
there are put in, and it is written back. Tokens are sorted by slot first, so that each tile is touched by one run of
tokens alone and the copies of different runs cannot meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lineshaft_contract.problems import KVProblem
from lineshaft_tpu.chips import MIB, Chip
from lineshaft_tpu.tiling import LANES, padded, sublanes, usable_vmem

Array = jax.Array

RING = 16
"""Tiles in VMEM at a time."""

AHEAD = 8
"""Tiles that are being read ahead of the one that is filled; the other RING - AHEAD are being written back."""

TOKENS = 256
"""Most tokens of a grid step."""


def write_kv(
    problem: KVProblem, chip: Chip, pages: tuple[Array, ...], new: tuple[Array, ...], slots: Array, *, interpret: Any
) -> tuple[Array, ...]:
    """Store row t of each of `new` at slots[t] of its pages; page 0 is left as it is.

    pages: [N, Hkv, page, Dp] of problem.kv_dtype, for keys and, if they are held apart, values; new: [T, Hkv, D] of the
    same dtype each; slots int32[T], where those of pages other than 0 differ from each other. Returns the pages.
    """
    rows = sublanes(problem.kv_dtype)
    step = _tokens(problem, chip)
    order, runs = _runs(slots, problem.page_size, rows, step)
    values = [_ordered(x, order, step, held.shape[-1]) for x, held in zip(new, pages, strict=True)]
    tiles = [held.reshape(*held.shape[:2], -1, rows, held.shape[-1]) for held in pages]
    found = _call(_Static(rows, problem.page_size, step, chip), runs, values, tiles, interpret)
    return tuple(tile.reshape(held.shape) for tile, held in zip(found, pages, strict=True))


def vmem_bytes(problem: KVProblem, tokens: int) -> int:
    """What a grid step of `tokens` tokens takes: their rows in float32, twice, and the ring of tiles."""
    width = padded(problem.qk_dim, LANES) + (padded(problem.v_dim, LANES) if problem.v_dim else 0)
    new = 2 * tokens * padded(problem.kv_heads, 8) * width * 4
    return new + RING * problem.kv_heads * width * 32


def _tokens(problem: KVProblem, chip: Chip) -> int:
    """Tokens of a grid step: as many as a quarter of VMEM, or 16 MiB, holds."""
    tokens = min(TOKENS, padded(problem.rows, 8))
    while tokens > 8 and vmem_bytes(problem, tokens) > min(chip.vmem // 4, 16 * MIB):
        tokens = padded(tokens // 2, 8)
    return tokens


class _Runs(NamedTuple):
    """Tokens sorted by slot, in groups of one tile each; none for page 0. A run never crosses two grid steps."""

    slots: Array  # int32[n], sorted
    starts: Array  # int32[n + 1]: the first token of each run, and where the last run ends
    first: Array  # int32[steps + 1]: the first run of each grid step


def _runs(slots: Array, page: int, rows: int, step: int) -> tuple[Array, _Runs]:
    """(which token comes n-th, int32[T]; its runs) for tiles of `rows` slots and grid steps of `step` tokens."""
    count = len(slots)
    key = jnp.where(slots < page, jnp.int32(2**31 - 1), slots)
    key, order = lax.sort((key, jnp.arange(count, dtype=jnp.int32)), num_keys=1)
    size = padded(count, step)
    key = jnp.pad(key, (0, size - count), constant_values=2**31 - 1)
    at, live = jnp.arange(size, dtype=jnp.int32), key < 2**31 - 1
    tile = key // rows
    begins = live & ((at % step == 0) | (tile != jnp.roll(tile, 1)))
    before = jnp.cumsum(jnp.pad(begins, (1, 0)), dtype=jnp.int32)
    starts = jnp.sort(jnp.where(jnp.pad(begins, (0, 1)), jnp.arange(size + 1), jnp.sum(live))).astype(jnp.int32)
    return order, _Runs(key, starts, before[::step])


def _ordered(new: Array, order: Array, step: int, dim: int) -> Array:
    """new [T, Hkv, D] -> f32[n, Hkv, dim] in the order of slots: every stored value is one of float32."""
    rows = new[order].astype(jnp.float32)
    return jnp.pad(rows, ((0, padded(len(order), step) - len(order)), (0, 0), (0, dim - new.shape[-1])))


# ---- the kernel ------------------------------------------------------------------------------------------------


class _Static(NamedTuple):
    """What a kernel is compiled for: rows of a tile, tokens of a page and of a grid step."""

    rows: int
    page: int
    tokens: int
    chip: Chip


class _Refs(NamedTuple):
    """Where a kernel is and what it reads and writes."""

    step: Any
    slots: Any
    starts: Any
    first: Any
    new: tuple[Any, ...]  # f32[tokens, Hkv, D] for keys and values
    tiles: tuple[Any, ...]  # [N, Hkv, page / rows, rows, D] in HBM, read and written
    ring: tuple[Any, ...]  # [RING, Hkv, rows, D]
    read: Any  # semaphores [RING]
    written: Any  # semaphores [RING]


def _call(static: _Static, runs: _Runs, new: list[Array], tiles: list[Array], interpret: Any) -> Any:
    count = len(new)
    anywhere = [pl.BlockSpec(memory_space=pl.ANY)] * count
    return pl.pallas_call(
        _kernel(static, count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(runs),
            grid=(new[0].shape[0] // static.tokens,),
            in_specs=[
                *[pl.BlockSpec((static.tokens, *x.shape[1:]), lambda step, *_: (step, 0, 0)) for x in new],
                *anywhere,
            ],
            out_specs=anywhere,
            scratch_shapes=[
                *[pltpu.VMEM((RING, t.shape[1], *t.shape[3:]), t.dtype) for t in tiles],
                pltpu.SemaphoreType.DMA((RING,)),
                pltpu.SemaphoreType.DMA((RING,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(t.shape, t.dtype) for t in tiles],
        input_output_aliases={len(runs) + count + n: n for n in range(count)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=usable_vmem(static.chip)
        ),
        interpret=interpret,
        name="lineshaft_write_kv",
    )(*runs, *new, *tiles)


def _kernel(static: _Static, count: int) -> Callable[..., None]:
    def run(slots: Any, starts: Any, first: Any, *refs: Any) -> None:
        new, tiles, ring = refs[:count], refs[2 * count : 3 * count], refs[3 * count : 4 * count]
        _step(static, _Refs(pl.program_id(0), slots, starts, first, new, tiles, ring, *refs[4 * count :]))

    return run


def _step(static: _Static, refs: _Refs) -> None:
    """The runs of a grid step: read ahead, fill, write back; all is written when it ends."""
    first, end = refs.first[refs.step], refs.first[refs.step + 1]

    def read_ahead(run: Any) -> None:
        @pl.when(run < end)
        def _() -> None:
            @pl.when(run - RING >= first)
            def _() -> None:
                _wait_written(static, refs, run)

            for copy in _copies(static, refs, run, write=False):
                copy.start()

    def begin(n: Any, _: None) -> None:
        read_ahead(first + n)

    def one(run: Any, _: None) -> None:
        read_ahead(run + AHEAD)
        for copy in _copies(static, refs, run, write=False):
            copy.wait()
        _fill(static, refs, run)
        for copy in _copies(static, refs, run, write=True):
            copy.start()

    def drain(run: Any, _: None) -> None:
        _wait_written(static, refs, run)

    lax.fori_loop(0, AHEAD, begin, None)
    lax.fori_loop(first, end, one, None)
    lax.fori_loop(jnp.maximum(first, end - RING), end, drain, None)


def _wait_written(static: _Static, refs: _Refs, run: Any) -> None:
    """Wait until the tile that shares a place in the ring with `run` is back in its page."""
    for copy in _copies(static, refs, run, write=True):
        copy.wait()


def _copies(static: _Static, refs: _Refs, run: Any, *, write: bool) -> list[Any]:
    """The copies of a run's tile of keys and of values between its page and its place in the ring."""
    place, slot = lax.rem(run, jnp.int32(RING)), refs.slots[refs.starts[run]]
    page = lax.div(slot, jnp.int32(static.page))
    tile = lax.div(slot - page * static.page, jnp.int32(static.rows))
    sems = refs.written if write else refs.read
    pairs = [(held.at[page, :, tile], ring.at[place]) for held, ring in zip(refs.tiles, refs.ring, strict=True)]
    return [pltpu.make_async_copy(*(pair[::-1] if write else pair), sems.at[place]) for pair in pairs]


def _fill(static: _Static, refs: _Refs, run: Any) -> None:
    """Put the rows of a run's tokens into its tile."""
    place = lax.rem(run, jnp.int32(RING))
    for new, ring in zip(refs.new, refs.ring, strict=True):

        def one(token: Any, tile: Any, new: Any = new) -> Any:
            rows = new[token - refs.step * static.tokens]  # [Hkv, D]
            at = lax.rem(refs.slots[token], jnp.int32(static.rows))
            mine = lax.broadcasted_iota(jnp.int32, tile.shape, 1) == at
            return jnp.where(mine, rows[:, None, :], tile)

        tile = ring[place].astype(jnp.float32)
        tile = lax.fori_loop(refs.starts[run], refs.starts[run + 1], one, tile)
        ring[place] = tile.astype(ring.dtype)
