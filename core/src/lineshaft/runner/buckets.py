"""Which static shapes a run needs, and the smallest one that a step fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lineshaft_contract.backends import Capabilities
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
    capabilities: Capabilities, token_budget: int, max_rows: int, pages_per_row: tuple[int, ...]
) -> tuple[StepShape, ...]:
    """All buckets of a run, smallest first.

    Decode buckets hold one token a row, in powers of two. Prefill and mixed buckets hold up to the token budget, for
    one row (a lone prompt samples one row of logits, not a batchful) and for the whole batch.
    """
    rows = _table(capabilities.row_buckets, powers_of_two(1, max_rows), max_rows)
    first = min(SMALLEST_MIXED, token_budget)
    tokens = _table(capabilities.token_buckets, powers_of_two(first, token_budget), token_budget)
    decode = [StepShape(n, n, pages_per_row, n, 1) for n in rows]
    mixed = [StepShape(t, b, pages_per_row, b, t) for t in tokens for b in dict.fromkeys((rows[0], rows[-1]))]
    return tuple(sorted({*decode, *mixed}, key=_size))


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


def _table(given: Sequence[int] | None, default: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """The backend's table cut at the configured limit, or the default."""
    if given is None:
        return default
    return (*(n for n in sorted(given) if n < largest), largest)
