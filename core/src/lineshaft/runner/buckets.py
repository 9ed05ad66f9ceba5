"""Which static shapes a run needs, and the smallest one that a step fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lineshaft.scheduler import Limits
from lineshaft_contract.backends import Capabilities
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import StepShape

SMALLEST_MIXED = 16
"""Tokens of the smallest prefill bucket, unless the backend brings its own table."""


class Need(NamedTuple):
    """What a step must hold: tokens, rows, rows that sample, and the longest query of a row."""

    tokens: int
    rows: int
    logits: int
    max_query: int

    def join(self, other: Need) -> Need:
        """A need that covers both, for replicas that step together."""
        return Need(*map(max, self, other))


def powers_of_two(first: int, last: int) -> tuple[int, ...]:
    """first, 2 first, 4 first, … up to and always including `last`."""
    out = []
    while first < last:
        out.append(first)
        first *= 2
    return (*out, last)


def make_shapes(
    capabilities: Capabilities, limits: Limits, pages_per_row: tuple[int, ...], replicas: int = 1
) -> tuple[StepShape, ...]:
    """All buckets of a run, smallest first; `limits` are within the backend's tables.

    Decode buckets hold one token a row. Prefill buckets are for one row (a lone prompt samples one row of logits, not a
    batchful) and for as many as a step with a prefill may have: the whole batch, unless nothing decodes in the same
    bucket, in this step or in that of another replica. One bucket has room for the logits of a scored prompt.
    """
    rows = _table(capabilities.row_buckets, 1, limits.max_rows)
    shapes = {StepShape(n, n, pages_per_row, n, 1) for n in rows}
    longest = min(limits.chunk, limits.max_model_len)
    apart = not limits.mixed_steps and replicas == 1
    most = min(rows[-1], limits.max_prefill_rows or rows[-1]) if apart else rows[-1]
    for count in (min(rows[0], most), most):
        tokens = _table(capabilities.token_buckets, SMALLEST_MIXED, min(limits.token_budget, count * longest))
        shapes |= {StepShape(n, count, pages_per_row, count, min(n, longest)) for n in tokens}
    # A scored prompt that is alone has no more tokens than rows of logits.
    scored = next(n for n in tokens if n == tokens[-1] or (most == 1 and n >= rows[-1]))
    shapes.add(StepShape(scored, most, pages_per_row, rows[-1], min(scored, longest)))
    return tuple(sorted(shapes, key=_size))


def padding_share(table: Sequence[int], weights: Sequence[float] | HostArray) -> float:
    """The share of positions that are padding, where lengths 1, 2, 3, … occur in the ratio of `weights`.

    Each is padded to the first of `table`, ascending, that holds it; the last holds them all.
    """
    lengths = np.arange(1, len(weights) + 1)
    padded = np.asarray(table)[np.searchsorted(table, lengths)]
    return 1 - float(lengths @ weights) / float(padded @ weights)


def fit(shapes: Sequence[StepShape], need: Need) -> StepShape:
    """The first of `shapes`, smallest first, that holds the step; the scheduler's limits promise that there is one."""
    for shape in shapes:
        if (
            shape.tokens >= need.tokens
            and shape.rows >= need.rows
            and shape.logits >= need.logits
            and shape.max_query >= need.max_query
        ):
            return shape
    raise AssertionError(f"no bucket holds {need}; the scheduler exceeded its limits")


def _size(shape: StepShape) -> tuple[int, int, int]:
    return (shape.tokens, shape.logits, shape.max_query)


def _table(given: Sequence[int] | None, first: int, largest: int) -> tuple[int, ...]:
    """The backend's table, or powers of two, cut at what the limits allow."""
    return (*(n for n in sorted(given or powers_of_two(first, largest)) if n < largest), largest)
