"""What the scheduler may put in a step (`Limits`) and what it did put there (`Batch`).

Knows requests and pages to copy; not how a step is laid out in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lineshaft.cache import PageCopy
from lineshaft.errors import InvalidValue
from lineshaft.scheduler.request import Request


@dataclass(frozen=True)
class Limits:
    """What one step may hold; every number is at least 1. A prefill row is any row that is not a decode row."""

    token_budget: int  # tokens a step
    max_rows: int  # running requests, and so rows a step; more than token_budget are of no use
    max_model_len: int  # tokens a request, prompt and output
    max_prefill_rows: int | None = None  # prefill rows a step; None: as many as fit
    mixed_steps: bool = True  # False: a step holds decode rows or prefill rows, and the two take turns
    max_query: int | None = None  # tokens a row; None: as many as fit

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_rows", "max_model_len", "max_prefill_rows", "max_query"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValue(f"{name} = {value}: give a number of at least 1")


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens [start, start + count) of a request, computed in one step."""

    request: Request
    start: int
    count: int
    samples: bool = field(init=False)  # whether the row ends at the request's last token, so that the next is sampled

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", self.count == self.request.remaining)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: decode rows first, then prefill rows, each oldest request first."""

    rows: tuple[Row, ...]
    copies: tuple[PageCopy, ...]  # to be made in this order before anything is written
    preempted: tuple[int, ...]  # ids of requests that lost their pages to make room

    @property
    def tokens(self) -> int:
        """How many tokens the step computes."""
        return sum(row.count for row in self.rows)


class BatchBuilder:
    """A batch in the making, and the room that its limits leave."""

    def __init__(self, limits: Limits) -> None:
        self.rows: list[Row] = []
        self.copies: list[PageCopy] = []
        self.preempted: list[int] = []
        self.tokens_left = limits.token_budget
        self._prefills_left = limits.token_budget if limits.max_prefill_rows is None else limits.max_prefill_rows
        self._max_query = limits.token_budget if limits.max_query is None else limits.max_query

    @property
    def takes_prefill(self) -> bool:
        """Whether there is room for at least one token of one more prefill row."""
        return self.tokens_left > 0 and self._prefills_left > 0

    def add_decode(self, request: Request) -> None:
        """Add the one token that a request has left to compute."""
        self._add(request, 1)

    def add_prefill(self, request: Request) -> None:
        """Add as much of what a request has left to compute as there is room for."""
        self._add(request, min(request.remaining, self.tokens_left, self._max_query))
        self._prefills_left -= 1

    def build(self) -> Batch:
        """Return the finished batch."""
        return Batch(tuple(self.rows), tuple(self.copies), tuple(self.preempted))

    def _add(self, request: Request, count: int) -> None:
        self.rows.append(Row(request, request.computed, count))
        self.tokens_left -= count
