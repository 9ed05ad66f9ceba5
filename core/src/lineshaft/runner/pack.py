"""Packing a batch into a program's host buffer. Knows pages, slots and rows; no backend and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lineshaft.cache import CacheManager
from lineshaft.runner.buckets import Need
from lineshaft.scheduler import Batch, Request, Row
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import HostStep, StepShape, forward_inputs


def need_of(rows: Sequence[Row]) -> Need:
    """What a bucket must hold for these rows."""
    return Need(
        tokens=sum(row.count for row in rows),
        rows=len(rows),
        logits=sum(row.logits for row in rows),
        max_query=max((row.count for row in rows), default=0),
    )


Place = tuple[int, Request]
"""A row of logits, and the request whose next token is chosen from it."""


def places(scored: Sequence[tuple[int, Row]]) -> list[Place]:
    """Where the requests that get a token have the logits of it; `scored`: rows, each with its first row of logits."""
    return [(start + row.logits - 1, row.request) for start, row in scored if row.samples]


@dataclass(frozen=True)
class Packed:
    """A forward's inputs, and the places of tokens that the step before has not given yet."""

    host: HostStep
    unknown: Sequence[tuple[int, int]]  # (index into token_ids, request id)
    on_host: tuple[int, ...] = ()  # sequences whose saved pages are still wanted, where the step saves some

    def fill(self, tokens: Mapping[int, int]) -> None:
        """Put in the tokens, by request id; where one could not be sampled, the row is void and any id serves."""
        ids = self.host["token_ids"]
        for at, request_id in self.unknown:
            ids[at] = max(tokens[request_id], 0)


def pack_forward(batch: Batch, cache: CacheManager, page_sizes: Sequence[int], shape: StepShape) -> Packed:
    """The forward's inputs for this batch in this bucket; rows past the batch stay zero, which is padding."""
    host, rows = HostStep(forward_inputs(shape)), batch.rows
    counts = np.array([row.count for row in rows], np.int32)
    stops = counts + np.array([row.start for row in rows], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    total = int(ends[-1]) if rows else 0
    positions = np.arange(total, dtype=np.int32) + np.repeat(stops - ends, counts)
    tokens, unknown = _token_ids(rows, ends)
    host["token_ids"][:total] = tokens
    host["positions"][:total] = positions
    host["query_starts"][1 : len(rows) + 1] = ends
    host["query_starts"][len(rows) + 1 :] = total
    logit_rows = [at for row, end in zip(rows, ends.tolist(), strict=True) for at in range(end - row.logits, end)]
    host["logit_rows"][: len(logit_rows)] = logit_rows
    of_row = np.repeat(np.arange(len(rows)), counts)
    for group, page_size in enumerate(page_sizes):
        table = host[f"page_table.{group}"]
        for b, row in enumerate(rows):
            pages = cache.pages(row.request.id, group)
            table[b, : len(pages)] = pages
        page, offset = np.divmod(positions, page_size)
        host[f"slots.{group}"][:total] = table[of_row, page] * page_size + offset
        host[f"context_lens.{group}"][: len(rows)] = stops
    returning = [swap.seq for swap in batch.swaps_in]  # the cache manager no longer counts them as saved
    return Packed(host, unknown, (*cache.on_host, *returning) if batch.swaps_out else ())


def _token_ids(rows: Sequence[Row], ends: HostArray) -> tuple[list[int], list[tuple[int, int]]]:
    """The rows' tokens in order, 0 where one is not known yet, and where those are."""
    ids: list[int] = []
    unknown = []
    for b, row in enumerate(rows):
        tokens = row.request.tokens
        stop = row.start + row.count
        if stop > len(tokens):
            unknown.append((int(ends[b]) - 1, row.request.id))
            ids += [*tokens[row.start : stop - 1], 0]
        elif row.count == 1:
            ids.append(tokens[row.start])
        else:
            ids += tokens[row.start : stop]
    return ids, unknown
