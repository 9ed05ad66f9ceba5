"""Attention by gathered pages with masks, for one static shape, in float32 and integers of 32 bits.

Queries stand in lanes, one lane for each set of pages that is gathered, and are worked on in blocks of as many lanes,
or as many queries of one lane, as a memory budget allows; the loop over blocks is unrolled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import PageView, StepInputs
from lineshaft_neuron.kernels.bound import neuron_recipe
from lineshaft_neuron.kernels.ranking import iota
from lineshaft_torch.bound import Recipe
from lineshaft_torch.kernels.attend import FEATURES, MEMORY_MIB, gather_pages, softmax_with_sinks
from lineshaft_torch.pages import SLOTS_LAYOUT

MOST_BLOCKS = 64
"""Blocks that one attend may unroll into: the compiler sees each of them in every layer."""

Part = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Blocks:
    """How many lanes, and queries of each, are worked on at once: all queries, or those of one lane in parts."""

    lanes: int
    queries: int

    def count(self, lanes: int, queries: int) -> int:
        return -(-lanes // self.lanes) * -(-queries // self.queries)


def lane_shape(problem: AttendProblem) -> tuple[int, int]:
    """(lanes, queries of each): one lane of all tokens for one row, a lane for each token where rows have one query
    at most, else a lane for each row."""
    if problem.rows == 1:
        return 1, problem.tokens
    if problem.max_query == 1:
        return problem.tokens, 1
    return problem.rows, min(problem.max_query or problem.tokens, problem.tokens)


def temporary_bytes(problem: AttendProblem, lanes: int, queries: int) -> int:
    """Bytes that one block holds at its peak: scores and weights [L, Hq, Q, K], keys and values [L, K, Hkv, D], each as
    stored and widened."""
    keys = problem.pages * problem.page_size
    scores = lanes * problem.q_heads * queries * keys
    pages = lanes * keys * problem.kv_heads * (problem.qk_dim + problem.v_dim)
    return 4 * (3 * scores + 2 * pages)


def blocks_within(problem: AttendProblem, budget_mib: int) -> Blocks:
    """The largest blocks within the budget, or of one query."""
    lanes, queries = lane_shape(problem)
    while temporary_bytes(problem, lanes, queries) > budget_mib * 2**20 and (lanes > 1 or queries > 1):
        lanes, queries = (-(-lanes // 2), queries) if lanes > 1 else (1, -(-queries // 2))
    return Blocks(lanes, queries)


def supports(problem: AttendProblem, budget_mib: int = MEMORY_MIB) -> str | None:
    blocks = blocks_within(problem, budget_mib)
    needed = temporary_bytes(problem, blocks.lanes, blocks.queries)
    if needed > budget_mib * 2**20:
        return f"gathers a row's pages: {needed >> 20} MiB of temporaries exceed its budget of {budget_mib} MiB"
    if blocks.count(*lane_shape(problem)) > MOST_BLOCKS:
        return f"within {budget_mib} MiB it would unroll into more than {MOST_BLOCKS} blocks"
    return None


@dataclass(frozen=True)
class Lanes:
    """Queries [L, Q] and the keys that those of a lane may see.

    table        int32[L, P]
    page_starts  int32[L, P], or None: pages follow one another
    lens         int32[L]: keys of the lane
    count        int32[L]: its queries, of which the last is at lens - 1; the rest of its Q is padding
    at           int32[L * Q], the token of each query, or None: tokens are in this order already
    back, live   int32[T] and bool[T], used with `at`: the query of each token, and whether it has one
    """

    table: torch.Tensor
    page_starts: torch.Tensor | None
    lens: torch.Tensor
    count: torch.Tensor
    at: torch.Tensor | None
    back: torch.Tensor
    live: torch.Tensor

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [L, Q, ...]."""
        ordered = x if self.at is None else x.index_select(0, self.at)
        return ordered.reshape(len(self.lens), -1, *x.shape[1:])

    def join(self, y: torch.Tensor, nothing: float) -> torch.Tensor:
        """[L * Q, ...] -> [T, ...], `nothing` for a token that is no query of a row."""
        if self.at is None:
            return y
        live = self.live.view(-1, *(1,) * (y.ndim - 1))
        return torch.where(live, y.index_select(0, self.back), nothing)

    def part(self, which: slice) -> Lanes:
        """Some of the lanes, without a way from or to tokens."""
        starts = None if self.page_starts is None else self.page_starts[which]
        return Lanes(self.table[which], starts, self.lens[which], self.count[which], None, self.back, self.live)


def lanes_of(problem: AttendProblem, view: PageView, query_starts: torch.Tensor) -> Lanes:
    starts, stops = query_starts[:-1], query_starts[1:]
    token = iota(problem.tokens, starts.device)
    row = (token[:, None] >= stops).sum(-1, dtype=torch.int32).clamp(max=problem.rows - 1)
    live = token < stops[-1]
    table, places, lens, count = view.page_table, view.page_starts, view.context_lens, stops - starts
    places = places if problem.page_starts else None
    if problem.rows == 1:
        return Lanes(table, places, lens, count, None, row, live)
    if problem.max_query == 1:
        places = None if places is None else places.index_select(0, row)
        table, lens = table.index_select(0, row), lens.index_select(0, row)
        return Lanes(table, places, lens, live.to(torch.int32), None, row, live)
    queries = lane_shape(problem)[1]
    at = (starts[:, None] + iota(queries, starts.device)).clamp(max=problem.tokens - 1).flatten()
    index = (token - starts.index_select(0, row)).clamp(0, queries - 1)
    return Lanes(table, places, lens, count, at, row * queries + index, live)


@dataclass(frozen=True)
class Keys:
    """What some lanes may see: k f32[L, K, Hkv, D], v f32[L, K, Hkv, Dv], the position int32[L or 1, K] of each key,
    whether it is live bool[L, K], and the lanes."""

    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    held: torch.Tensor
    lanes: Lanes

    @property
    def first(self) -> torch.Tensor:
        """int32[L]: the position of each lane's first query."""
        return self.lanes.lens - self.lanes.count


def keys_of(problem: AttendProblem, cache: Cache, lanes: Lanes) -> Keys:
    k, v = gather_pages(problem, cache, lanes.table)
    page = iota(problem.page_size, k.device)
    position = iota(k.shape[1], k.device)[None]
    if lanes.page_starts is not None:
        position = (lanes.page_starts[:, :, None] + page).flatten(1)
    held = (lanes.table != 0)[:, :, None].expand(-1, -1, problem.page_size).flatten(1)
    return Keys(k.float(), v.float(), position, held & (position < lanes.lens[:, None]), lanes)


def visibility(
    problem: AttendProblem, keys: Keys, index: torch.Tensor, ranges: torch.Tensor | None, bits: torch.Tensor | None
) -> torch.Tensor:
    """index int32[Q], which queries of the lanes; ranges int32[L, Q, 2]; bits int32[L, Q, words] -> bool[L, Q, K]."""
    query = (keys.first[:, None] + index)[:, :, None]
    key = keys.position[:, None]
    visible = keys.held[:, None] & (index < keys.lanes.count[:, None])[:, :, None]
    if problem.causal:
        visible = visible & (key <= query)
    if problem.window:
        visible = visible & (key > query - problem.window)
    if ranges is not None:
        visible = visible & (key >= ranges[..., :1]) & (key < ranges[..., 1:])
    return visible if bits is None else visible & is_ancestor(keys.position - keys.first[:, None], bits)


def is_ancestor(relative: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """relative int32[L, K]: keys after the first query, bits int32[L, Q, words] -> bool[L, Q, K]: bit `relative` is
    set, or it is negative."""
    flags = ((bits[..., None] >> iota(32, bits.device)) & 1).flatten(2)
    index = relative.clamp(0, flags.shape[2] - 1).long()[:, None].expand(-1, flags.shape[1], -1)
    return (flags.gather(2, index) == 1) | (relative < 0)[:, None]


def attend_block(
    problem: AttendProblem, q: torch.Tensor, keys: Keys, visible: torch.Tensor, sinks: torch.Tensor | None
) -> Part:
    """q [L, Q, Hq, D], visible bool[L, Q, K] -> (out [L * Q, Hq, Dv] as q, lse f32[L * Q, Hq]),
    contiguous: a caller's reshape must not have to copy."""
    heads = q.float().reshape(*q.shape[:2], problem.kv_heads, -1, problem.qk_dim)
    scores = torch.einsum("lqhgd,lkhd->lhgqk", heads, keys.k) * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    weights, lse = softmax_with_sinks(torch.where(visible[:, None, None], scores, -torch.inf), sinks)
    seen = torch.where(visible.any(1)[:, :, None, None], keys.v, 0.0)  # a weight of 0 does not make a NaN 0
    out = torch.einsum("lhgqk,lkhd->lqhgd", weights, seen).flatten(2, 3)
    return out.flatten(0, 1).to(q.dtype).contiguous(), lse.flatten(1, 2).transpose(1, 2).flatten(0, 1).contiguous()


def attend(
    problem: AttendProblem,
    blocks: Blocks,
    q: torch.Tensor,
    cache: Cache,
    step: StepInputs,
    *,
    sinks: torch.Tensor | None = None,
    key_ranges: torch.Tensor | None = None,
    ancestors: torch.Tensor | None = None,
) -> Any:
    """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse f32[T, Hq])."""
    lanes = lanes_of(problem, step.groups[problem.group], step.query_starts)
    bits = None if ancestors is None else ancestors.view(torch.int32)
    queries = lanes.split(q)
    ranges, bits = (None if x is None else lanes.split(x) for x in (key_ranges, bits))
    parts = []
    for some in slices(queries.shape[0], blocks.lanes):
        keys = keys_of(problem, cache, lanes.part(some))
        for these in slices(queries.shape[1], blocks.queries):
            index = iota(queries.shape[1], q.device)[these]
            masks = (None if x is None else x[some, these] for x in (ranges, bits))
            visible = visibility(problem, keys, index, *masks)
            parts.append(attend_block(problem, queries[some, these], keys, visible, sinks))
    out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True))
    return (lanes.join(out, 0.0), lanes.join(lse, -torch.inf)) if problem.return_lse else lanes.join(out, 0.0)


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`, which cover `count`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def recipes(budget_mib: int = MEMORY_MIB) -> list[Recipe]:
    def bind(problem: AttendProblem, session: Any) -> Any:
        return partial(attend, problem, blocks_within(problem, budget_mib))

    return [
        neuron_recipe(
            "neuron_attend", "attend", bind, layout=SLOTS_LAYOUT, handles=FEATURES,
            supports=partial(supports, budget_mib=budget_mib),
        )
    ]  # fmt: skip
