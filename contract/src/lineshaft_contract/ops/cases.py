"""What case generators share: seeds by case id, dtype variants, and paged steps with garbage where nothing is live."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lineshaft_contract.ops.spec import HostArray, Size, StepArg, numpy_dtype
from lineshaft_contract.steps import StepShape

Draw = Callable[[str], np.random.Generator]

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
GARBAGE = (np.nan, np.inf, -np.inf, 3e4, -3e4)
FUZZ_DTYPES = ("float32", "bfloat16")
LARGE = 2**20
"""Values of a pool that is made in the dtype of its pages, without random garbage, to spare time and memory."""


def seeded(rng: np.random.Generator) -> Draw:
    """A generator per case id, so that a case keeps its values whichever other cases are made."""
    seed = int(rng.integers(2**32))
    return lambda case_id: np.random.default_rng([seed, zlib.crc32(case_id.encode())])


def dtypes(size: Size) -> tuple[str, ...]:
    """The executed dtypes of a case table."""
    return ("float32", "bfloat16") if size == "smoke" else ("float32", "bfloat16", "float64")


def short(dtype: str) -> str:
    """A dtype's name within case ids."""
    return _SHORT[dtype]


def variants(size: Size, smoke: Iterable[str], full: Iterable[str] = ()) -> list[tuple[str, str]]:
    """(name, dtype) of every case: `smoke` names, and `full` ones at that size, under each dtype."""
    names = [*smoke, *(full if size == "full" else ())]
    return [(name, dtype) for dtype in dtypes(size) for name in names]


@dataclass(frozen=True)
class Paging:
    """How a step's rows lie in pages.

    lengths   (query length, keys visible after this step's writes) of each row
    page_size tokens a page
    padding   tokens beyond the last row's
    pool      pages of the cache, null page included (0: a few more than needed); the highest ids are used
    group     the cache group; groups below it get tables of zeros
    starts    give page_starts: each row's pages in reverse order, with its second page dropped
    dropped   leading pages of each row that a window has left behind: their table entries are 0
    spare     page-table columns beyond the longest row's pages
    stale     table entries beyond a row's pages name pages of other rows, not page 0
    shifted   positions differ from the places in the context
    garbage   what lies where no key is live
    """

    lengths: tuple[tuple[int, int], ...]
    page_size: int = 16
    padding: int = 0
    pool: int = 0
    group: int = 0
    starts: bool = False
    dropped: int = 0
    spare: int = 1
    stale: bool = False
    shifted: bool = False
    garbage: tuple[float, ...] = GARBAGE

    @property
    def tokens(self) -> int:
        return sum(query for query, _ in self.lengths) + self.padding

    @property
    def columns(self) -> int:
        """Page-table columns: the longest row's pages, and those that are always padding."""
        return self.spare + max(self.pages_of(keys) for _, keys in self.lengths)

    def pages_of(self, keys: int) -> int:
        return -(-keys // self.page_size)

    @property
    def pages(self) -> int:
        return self.pool or 4 + sum(self.pages_of(keys) for _, keys in self.lengths)


@dataclass(frozen=True)
class PagedStep:
    """A step and, for its cache, which offsets of which pages hold live keys: bool[N, page]."""

    step: StepArg
    live: HostArray

    def fill(
        self, rng: np.random.Generator, width: Sequence[int], garbage: Sequence[float] = GARBAGE, dtype: str = "float64"
    ) -> HostArray:
        """Pages [N, page, *width]: normal where live, else `garbage` in turn; float64, or if LARGE of `dtype`."""
        shape = (*self.live.shape, *width)
        if math.prod(shape) > LARGE:
            pages = np.full(shape, garbage[0], numpy_dtype(dtype))
            pages[self.live] = rng.standard_normal((int(self.live.sum()), *width))
            return pages
        return np.where(self.live[..., None, None], rng.standard_normal(shape), np.resize(garbage, shape))


def fuzz_paging(pick: np.random.Generator) -> Paging:
    """Random rows in pages of a random size, some of them empty or without a query."""
    lengths = []
    for _ in range(int(pick.integers(1, 6))):
        keys = int(pick.choice((0, 1, int(pick.integers(1, 40)), int(pick.integers(1, 300)))))
        lengths.append((min(int(pick.choice((0, 1, 1, int(pick.integers(1, 20))))), keys), keys))
    size = int(pick.choice([1, 3, 8, 16, 20, 32, 64, 128]))
    padding = int(pick.integers(0, 4)) + (sum(query for query, _ in lengths) == 0)
    return Paging(tuple(lengths), size, padding=padding, stale=bool(pick.random() < 0.3))


def paged_step(rng: np.random.Generator, paging: Paging) -> PagedStep:
    """The arrays of `forward_inputs` for rows that lie on random pages; table entries beyond a row are 0."""
    table = _page_table(rng, paging)
    starts = np.zeros_like(table)
    for row, (_, keys) in enumerate(paging.lengths):
        count = paging.pages_of(keys)
        starts[row, :count] = np.arange(count) * paging.page_size
        if paging.starts:
            table[row, :count], starts[row, :count] = table[row, :count][::-1], starts[row, :count][::-1]
            table[row, 1:2] = 0
        table[row, : paging.dropped] = 0
        if paging.stale:
            table[row, count:] = rng.permutation(np.arange(1, paging.pages))[: paging.columns - count]
    live = np.zeros((paging.pages, paging.page_size), bool)
    slots = np.zeros(paging.tokens, np.int32)
    token = 0
    for row, (query, keys) in enumerate(paging.lengths):
        count = paging.pages_of(keys)
        places = _slots(table[row, :count], starts[row, :count], paging.page_size, keys)
        live.reshape(-1)[places] = True
        live[0] = False
        at = np.arange(token, token + query)
        wanted = keys - query + np.arange(query)
        held = wanted >= 0
        slots[at[held]] = places[wanted[held]]
        token += query
    return PagedStep(_step_arg(paging, table, starts, slots), live)


def _page_table(rng: np.random.Generator, paging: Paging) -> HostArray:
    needed = sum(paging.pages_of(keys) for _, keys in paging.lengths)
    first = max(1, paging.pages - 2 * needed) if paging.pool else 1
    free = list(rng.permutation(np.arange(first, paging.pages)))
    table = np.zeros((len(paging.lengths), paging.columns), np.int32)
    for row, (_, keys) in enumerate(paging.lengths):
        for column in range(paging.pages_of(keys)):
            table[row, column] = free.pop()
    return table


def _slots(table: HostArray, starts: HostArray, page_size: int, keys: int) -> HostArray:
    """The slot of each position below `keys`; 0 where its page is dropped."""
    slots = np.zeros(keys, np.int64)
    for page, start in zip(table, starts, strict=True):
        stop = min(int(start) + page_size, keys)
        if page and stop > start:
            slots[start:stop] = page * page_size + np.arange(stop - start)
    return slots


def _step_arg(paging: Paging, table: HostArray, starts: HostArray, slots: HostArray) -> StepArg:
    queries = [query for query, _ in paging.lengths]
    bounds = np.cumsum([0, *queries]).astype(np.int32)
    positions = np.zeros(paging.tokens, np.int32)
    for row, (query, keys) in enumerate(paging.lengths):
        positions[bounds[row] : bounds[row + 1]] = np.maximum(keys - query + np.arange(query), 0)
    if paging.shifted:
        positions = positions[::-1] * 3 + 1000
    arrays = {
        "token_ids": np.zeros(paging.tokens, np.int32),
        "positions": positions,
        "query_starts": bounds,
        "logit_rows": np.zeros(len(queries), np.int32),
    }
    for group in range(paging.group + 1):
        own = int(group == paging.group)
        arrays[f"slots.{group}"] = slots * own
        arrays[f"page_table.{group}"] = table * own
        arrays[f"context_lens.{group}"] = np.array([keys for _, keys in paging.lengths], np.int32) * own
        if paging.starts:
            arrays[f"page_starts.{group}"] = starts * own
    shape = StepShape(
        tokens=paging.tokens, rows=len(queries), pages=(paging.columns,) * (paging.group + 1), logits=len(queries),
        max_query=max(queries),
    )  # fmt: skip
    return StepArg(arrays, shape)
