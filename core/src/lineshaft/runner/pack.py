"""Packing a batch into a program's host buffer. Knows pages, slots and rows; no backend and no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lineshaft.cache import CacheManager
from lineshaft.contract.steps import HostStep, StepShape, forward_inputs, sample_inputs
from lineshaft.runner.buckets import Need
from lineshaft.sampling.draw import PURPOSE_SAMPLE, draw
from lineshaft.scheduler import Batch, Request, Row


def need_of(rows: Sequence[Row]) -> Need:
    """What a bucket must hold for these rows."""
    return Need(
        tokens=sum(row.count for row in rows),
        rows=len(rows),
        logits=sum(row.samples for row in rows),
        max_query=max((row.count for row in rows), default=0),
    )


def pack_forward(batch: Batch, cache: CacheManager, page_sizes: Sequence[int], shape: StepShape) -> HostStep:
    """The forward's inputs for this batch in this bucket; rows past the batch stay zero, which is padding."""
    host = HostStep(forward_inputs(shape))
    tokens, positions, starts = host["token_ids"], host["positions"], host["query_starts"]
    at = sampled = 0
    for b, row in enumerate(batch.rows):
        end = at + row.count
        tokens[at:end] = row.request.tokens[row.start : row.start + row.count]
        positions[at:end] = np.arange(row.start, row.start + row.count, dtype=np.int32)
        for group, page_size in enumerate(page_sizes):
            _pack_group(host, group, page_size, cache.pages(row.request.id, group), b, at, row)
        if row.samples:
            host["logit_rows"][sampled] = end - 1
            sampled += 1
        at = starts[b + 1] = end
    starts[len(batch.rows) + 1 :] = at
    return host


def _pack_group(host: HostStep, group: int, page_size: int, pages: Sequence[int], b: int, at: int, row: Row) -> None:
    stop = row.start + row.count
    used = -(-stop // page_size)
    table = host[f"page_table.{group}"]
    table[b, :used] = pages[:used]
    positions = np.arange(row.start, stop, dtype=np.int32)
    host[f"slots.{group}"][at : at + row.count] = table[b][positions // page_size] * page_size + positions % page_size
    host[f"context_lens.{group}"][b] = stop


def pack_sampling(requests: Sequence[Request], rows: int) -> HostStep | None:
    """The sampling program's inputs, or None when every request is greedy (the forward's own argmax serves).

    The uniform number of a row depends on its seed and on the position of the token to come, and on nothing else.
    """
    if all(request.params.greedy for request in requests):
        return None
    host = HostStep(sample_inputs(rows))
    for r, request in enumerate(requests):
        params = request.params
        if params.greedy:
            continue
        host["temperature"][r], host["top_p"][r] = params.temperature, params.top_p
        host["min_p"][r], host["top_k"][r] = params.min_p, params.top_k
        host["u"][r, 0] = draw(params.seed or 0, request.fork, len(request.tokens), PURPOSE_SAMPLE, 0)
    return host
