"""Attention over a cache of the "hnd" layout, by blocks of queries and keys with an online softmax.

Temporaries stay within a budget whatever the problem, and blocks of keys that no query sees are not read: loops run as
often as the step's lengths ask. The method is that of FlashAttention (Dao et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import PageView, StepInputs
from lineshaft_jax.arrays import Array, round_up, widened
from lineshaft_jax.bound import Recipe, recipe, stateless
from lineshaft_jax.kernels.cache import supports
from lineshaft_jax.kernels.pages import LAYOUT, loaded
from lineshaft_jax.kernels.ragged import Blocks
from lineshaft_jax.kernels.schemes import decode

FEATURES = frozenset(
    {
        "causal", "window", "softcap", "sinks", "value_in_key", "return_lse", "page_starts", "key_ranges", "ancestors",
        "kv_scheme",
    }
)  # fmt: skip
MEMORY_MIB = 256
"""Default budget for the temporaries of one attend."""
FEW_QUERIES = 8
"""Rows of up to so many queries are attended to together, longer ones one after another."""
QUERIES, KEYS = 128, 256
"""Queries and keys of a block, where the budget has room for them."""


@dataclass(frozen=True)
class Tiles:
    """What is computed at a time: `rows` rows of `queries` queries each, against `columns` pages of each row.

    whole_rows: a tile has all queries of its rows; otherwise it is of one row.
    """

    rows: int
    queries: int
    columns: int
    whole_rows: bool

    @classmethod
    def of(cls, problem: AttendProblem, budget: int) -> Tiles:
        """The largest, up to QUERIES and KEYS, whose temporaries are within `budget` bytes; at least one of each."""
        longest = max(min(problem.max_query or problem.tokens, problem.tokens), 1)
        columns = max(min(-(-KEYS // problem.page_size), problem.pages), 1)
        few = longest <= FEW_QUERIES
        tiles = cls(problem.rows if few else 1, min(longest, QUERIES), columns, few)
        while tiles.temporary_bytes(problem) > budget and max(tiles.rows, tiles.queries, tiles.columns) > 1:
            tiles = tiles.halved()
        return tiles

    def halved(self) -> Tiles:
        """With fewer columns while there are many, then with fewer rows, and with fewer queries of a single row."""
        if self.columns > max(self.rows, self.queries) // 4 and self.columns > 1:
            return replace(self, columns=-(-self.columns // 2))
        if self.rows > 1:
            return replace(self, rows=-(-self.rows // 2))
        return replace(self, queries=-(-self.queries // 2), whole_rows=False)

    def temporary_bytes(self, problem: AttendProblem) -> int:
        """Bytes at the peak: scores, masked scores and weights [rows, Hq, queries, keys], keys and values as stored and
        widened, queries and their results, before and after an update."""
        dims = problem.qk_dim + problem.v_dim
        keys = self.columns * problem.page_size
        scores = self.rows * problem.q_heads * self.queries * keys
        pages = self.rows * keys * problem.kv_heads * dims
        return 4 * (3 * scores + 2 * pages + 2 * self.rows * problem.q_heads * self.queries * dims)


@dataclass(frozen=True)
class Queries:
    """A tile's queries: `queries` consecutive ones of each of `rows` rows.

    q           [rows, queries, Hq, D]
    table       int32[rows, P], starts int32[rows, P]: pages, and the position of the first key of each
    context     int32[rows]: visible keys
    base, first int32[rows]: position of the row's first query, and of the first one here
    count       int32[rows]: how many of the queries are the row's
    key_ranges  int32[rows, queries, 2] or None, ancestors uint32[rows, queries, words] or None
    """

    q: Array
    table: Array
    starts: Array
    context: Array
    base: Array
    first: Array
    count: Array
    key_ranges: Array | None
    ancestors: Array | None

    def position(self) -> Array:
        """int32[rows, queries]."""
        return self.first[:, None] + jnp.arange(self.q.shape[1], dtype=jnp.int32)

    def padded(self, columns: int) -> Queries:
        """With tables of a multiple of `columns` columns; the new ones are of page 0."""
        width = ((0, 0), (0, round_up(self.table.shape[1], columns) - self.table.shape[1]))
        return replace(self, table=jnp.pad(self.table, width), starts=jnp.pad(self.starts, width))


jax.tree_util.register_dataclass(
    Queries,
    ["q", "table", "starts", "context", "base", "first", "count", "key_ranges", "ancestors"],
    [],
)


def attend(
    budget: int,
    problem: AttendProblem,
    q: Array,
    cache: Cache,
    step: StepInputs,
    *,
    sinks: Array | None = None,
    kv_scales: Array | None = None,
    key_ranges: Array | None = None,
    ancestors: Array | None = None,
) -> Any:
    """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse f32[T, Hq]); temporaries are within `budget` bytes."""
    view = step.groups[problem.group]
    rows, pages = view.page_table.shape
    tiles = Tiles.of(replace(problem, tokens=q.shape[0], rows=rows, pages=pages), budget)
    one = partial(attend_tile, problem, tiles.columns, cache, sinks, kv_scales)
    whole = Step(q, step.query_starts, view, page_positions(problem, view), key_ranges, ancestors)
    out, lse = (whole.by_rows if tiles.whole_rows else whole.by_queries)(tiles, one)
    live = jnp.arange(q.shape[0]) < step.query_starts[-1]
    out = jnp.where(live[:, None, None], out, 0)
    return (out, jnp.where(live[:, None], lse, -jnp.inf)) if problem.return_lse else out


def page_positions(problem: AttendProblem, view: PageView) -> Array:
    """int32[B, P]: the position of the first key of each page."""
    if problem.page_starts:
        return view.page_starts
    rows, pages = view.page_table.shape
    return jnp.broadcast_to(jnp.arange(pages, dtype=jnp.int32) * problem.page_size, (rows, pages))


One = Callable[[Queries], tuple[Array, Array]]
"""A tile's (out [rows, queries, Hq, Dv], lse f32[rows, queries, Hq])."""


@dataclass(frozen=True)
class Step:
    """A step's queries and tables, from which tiles are cut."""

    q: Array
    query_starts: Array
    view: PageView
    starts: Array
    key_ranges: Array | None
    ancestors: Array | None

    def by_rows(self, tiles: Tiles, one: One) -> tuple[Array, Array]:
        """(out [T, Hq, Dv], lse f32[T, Hq]), `tiles.rows` rows at a time with all their queries."""
        rows, tokens = self.view.page_table.shape[0], self.q.shape[0]
        at = self.query_starts[:-1, None] + jnp.arange(tiles.queries, dtype=jnp.int32)
        at = jnp.minimum(at, tokens - 1)
        count = jnp.diff(self.query_starts)
        base = self.view.context_lens - count
        whole = Queries(
            self.q[at], self.view.page_table, self.starts, self.view.context_lens, base, base, count,
            *(None if x is None else x[at] for x in (self.key_ranges, self.ancestors)),
        )  # fmt: skip
        padding = round_up(rows, tiles.rows) - rows
        whole = jax.tree.map(lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)), whole)
        if padding + rows == tiles.rows:
            out, lse = one(whole)
        else:
            parts = lax.map(one, jax.tree.map(lambda x: x.reshape(-1, tiles.rows, *x.shape[1:]), whole))
            out, lse = (x.reshape(-1, *x.shape[2:]) for x in parts)
        token = jnp.arange(tokens, dtype=jnp.int32)
        row = jnp.minimum(jnp.sum(self.query_starts[1:] <= token[:, None], -1), rows - 1)
        index = jnp.clip(token - self.query_starts[row], 0, tiles.queries - 1)
        return out[row, index], lse[row, index]

    def by_queries(self, tiles: Tiles, one: One) -> tuple[Array, Array]:
        """(out [T, Hq, Dv], lse f32[T, Hq]), up to `tiles.queries` queries of one row at a time."""
        blocks = Blocks(self.query_starts, self.q.shape[0], tiles.queries)

        def run(row: Array, begin: Array) -> tuple[Array, Array]:
            out, lse = one(self._queries(blocks, row, begin))
            return out[0], lse[0]

        out, lse = blocks.map(run)
        return out, lse

    def _queries(self, blocks: Blocks, row: Array, begin: Array) -> Queries:
        start, stop = self.query_starts[row], self.query_starts[row + 1]
        context = self.view.context_lens[row]
        base = context - (stop - start)

        def cut(items: Array | None) -> Array | None:
            return None if items is None else blocks.cut(items, begin)[None]

        q = cut(self.q)
        assert q is not None
        return Queries(
            q, self.view.page_table[row][None], self.starts[row][None], context[None], base[None],
            (base + begin - start)[None], (stop - begin)[None], cut(self.key_ranges), cut(self.ancestors),
        )  # fmt: skip


def attend_tile(
    problem: AttendProblem, columns: int, cache: Cache, sinks: Array | None, kv_scales: Array | None, tile: Queries
) -> tuple[Array, Array]:
    """The (out, lse) of a tile's queries, `columns` pages of keys at a time.

    The running peak, total and sum of a query are of the keys seen so far: f32[rows, Hkv, G, queries, 1 | 1 | Dv].
    """
    rows, queries = tile.q.shape[:2]
    share = (rows, queries, problem.kv_heads, problem.q_heads // problem.kv_heads)
    q = tile.q.reshape(*share, -1).transpose(0, 2, 3, 1, 4)  # [rows, Hkv, G, queries, D]
    tile = tile.padded(columns)
    low, high = columns_seen(problem, tile)

    def body(i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        ids, starts = (lax.dynamic_slice_in_dim(x, i * columns, columns, 1) for x in (tile.table, tile.starts))
        visible = visibility(problem, tile, ids, starts)
        keys, values = gather_keys(problem, cache, ids, kv_scales)
        values = jnp.where(visible.any(1)[:, None, :, None], widened(values), 0.0)
        return absorbed(problem, q, keys, values, visible, running)

    flat = (*q.shape[:4], 1)
    empty = jnp.full(flat, -jnp.inf), jnp.zeros(flat), jnp.zeros((*q.shape[:4], problem.v_dim))
    peak, total, summed = lax.fori_loop(low // columns, -(-high // columns), body, empty)
    out, lse = finished(peak, total, summed, sinks)
    out = out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, problem.q_heads, problem.v_dim)
    return out.astype(tile.q.dtype), lse.transpose(0, 3, 1, 2).reshape(rows, queries, problem.q_heads)


def columns_seen(problem: AttendProblem, tile: Queries) -> tuple[Array, Array]:
    """(low, high): the first column of the page tables that may hold a key that a query of the tile sees, and the one
    after the last; int32[]."""
    last = tile.first + jnp.minimum(tile.count, tile.q.shape[1]) - 1
    seen = (tile.table != 0) & (tile.starts < tile.context[:, None]) & (tile.count > 0)[:, None]
    if problem.causal:
        seen &= tile.starts <= last[:, None]
    if problem.window:
        seen &= tile.starts + problem.page_size > (tile.first - problem.window)[:, None]
    column = jnp.arange(tile.table.shape[1], dtype=jnp.int32)
    high = jnp.max(jnp.where(seen, column + 1, 0))
    return jnp.minimum(jnp.min(jnp.where(seen, column, tile.table.shape[1])), high), high


def gather_keys(problem: AttendProblem, cache: Cache, ids: Array, kv_scales: Array | None) -> tuple[Array, Array]:
    """ids int32[rows, columns] -> keys [rows, Hkv, K, D] and values [rows, Hkv, K, Dv], K = columns * page: of the
    executed dtype if pages hold it, else in float32."""
    heads = jnp.arange(problem.kv_heads, dtype=jnp.int32)[None, :, None]

    def pages(name: str) -> Array | None:
        """[rows, Hkv, columns, page, width]."""
        array = cache.arrays.get(name)
        return None if array is None else array[ids[:, None], heads]

    def gathered(index: int, name: str, width: int) -> Array:
        kept = pages(name)
        assert kept is not None
        values = loaded(kept, width, problem.kv_dtype)
        if problem.kv_scheme != "none":
            assert kv_scales is not None
            values = decode(problem.kv_scheme, values, kv_scales[index], pages(f"{name}_scale"))
        elif problem.kv_dtype != problem.dtype:
            values = widened(values)
        return values.reshape(ids.shape[0], problem.kv_heads, -1, width)

    keys = gathered(0, "k", problem.qk_dim)
    return keys, keys[..., : problem.v_dim] if problem.value_in_key else gathered(1, "v", problem.v_dim)


def visibility(problem: AttendProblem, tile: Queries, ids: Array, starts: Array) -> Array:
    """ids, starts int32[rows, columns] -> bool[rows, queries, K]: whether a query looks at a key of these pages."""
    rows, columns = ids.shape
    offsets = jnp.arange(problem.page_size, dtype=jnp.int32)
    key = (starts[:, :, None] + offsets).reshape(rows, -1)
    held = jnp.broadcast_to((ids != 0)[:, :, None], (rows, columns, problem.page_size)).reshape(rows, -1)
    live, query = held & (key < tile.context[:, None]), tile.position()[:, :, None]
    visible = live[:, None] & (jnp.arange(query.shape[1]) < tile.count[:, None])[:, :, None]
    if problem.causal:
        visible &= key[:, None] <= query
    if problem.window:
        visible &= key[:, None] > query - problem.window
    if tile.key_ranges is not None:
        visible &= (key[:, None] >= tile.key_ranges[..., :1]) & (key[:, None] < tile.key_ranges[..., 1:])
    if tile.ancestors is not None:
        visible &= is_ancestor(key - tile.base[:, None], tile.ancestors)
    return visible


def is_ancestor(relative: Array, bits: Array) -> Array:
    """relative int32[rows, K], bits uint32[rows, queries, words] -> bool[rows, queries, K]: bit `relative` is set, or
    it is negative."""
    index = jnp.clip(relative, 0, bits.shape[2] * 32 - 1)[:, None]
    chosen = jnp.take_along_axis(bits, index // 32, 2) >> (index % 32).astype(jnp.uint32)
    return ((chosen & 1) == 1) | (relative < 0)[:, None]


def absorbed(
    problem: AttendProblem, q: Array, keys: Array, values: Array, visible: Array, running: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """The running (peak, total, sum) with further keys [rows, Hkv, K, D] and f32 values: scale, soft cap, mask.

    Products of bfloat16 queries and keys are exact in float32, in which they are summed.
    """
    peak, total, summed = running
    dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    scores = dot("bhgqd,bhkd->bhgqk", q.astype(keys.dtype), keys) * problem.scale
    if problem.softcap:
        scores = problem.softcap * jnp.tanh(scores / problem.softcap)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    higher = jnp.maximum(peak, scores.max(-1, keepdims=True))
    level = jnp.where(higher == -jnp.inf, 0.0, higher)
    weights, decay = jnp.exp(scores - level), jnp.exp(peak - level)
    added = dot("bhgqk,bhkd->bhgqd", weights, values)
    return higher, total * decay + weights.sum(-1, keepdims=True), summed * decay + added


def finished(peak: Array, total: Array, summed: Array, sinks: Array | None) -> tuple[Array, Array]:
    """(out f32[rows, Hkv, G, queries, Dv], lse f32[rows, Hkv, G, queries]); 0 and -inf where no key was visible.

    Sinks [Hq] take part in the weights, not in lse.
    """
    blind = peak == -jnp.inf
    level = jnp.where(blind, 0.0, peak)
    lse = jnp.where(blind, -jnp.inf, level + jnp.log(total))[..., 0]
    if sinks is None:
        return summed / jnp.where(blind, 1.0, total), lse
    sink = widened(sinks).reshape(1, *peak.shape[1:3], 1, 1)
    top = jnp.maximum(level, sink)
    share = jnp.exp(level - top)
    whole = total * share + jnp.exp(sink - top)
    return jnp.where(blind, 0.0, summed * share / jnp.where(blind, 1.0, whole)), lse


def merge_states(parts: Array, lse: Array, *, sinks: Array | None = None) -> Array:
    """parts [n, T, H, D], lse f32[n, T, H] over disjoint keys -> [T, H, D]; sinks [H] count here; all-empty gives 0."""
    top = lse.max(0)
    if sinks is not None:
        top = jnp.maximum(top, widened(sinks))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - top)
    total = weights.sum(0)
    if sinks is not None:
        total = total + jnp.exp(widened(sinks) - top)
    seen = jnp.where((lse > -jnp.inf)[..., None], widened(parts), 0.0)
    merged = (weights[..., None] * seen).sum(0) / jnp.where(total == 0, 1.0, total)[..., None]
    return merged.astype(parts.dtype)


def recipes(budget_mib: int = MEMORY_MIB) -> list[Recipe]:
    def bind(problem: AttendProblem, session: Any) -> Any:
        return partial(attend, budget_mib * 2**20, problem)

    options = {"memory_mib": str(budget_mib)}
    return [
        recipe("xla_attend", "attend", bind, layout=LAYOUT, handles=FEATURES, supports=supports, options=options),
        recipe("xla_merge_states", "merge_states", stateless(merge_states), handles=frozenset({"sinks"})),
    ]
