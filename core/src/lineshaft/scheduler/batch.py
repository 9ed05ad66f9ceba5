"""What the scheduler may put in a step (`Limits`) and what it did put there (`Batch`).

Knows requests and pages to copy or swap; not how a step is laid out in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.cache import PageCopy, PageSwap
from lineshaft.errors import InvalidValue
from lineshaft.scheduler.request import Request


@dataclass(frozen=True)
class Limits:
    """What one step may hold; every number is at least 1. A prefill row is any row that is not a decode row."""

    token_budget: int  # tokens a step
    max_rows: int  # running requests, and so rows and rows of logits a step; more than token_budget are of no use
    max_model_len: int  # tokens a request, prompt and output
    max_prefill_rows: int | None = None  # prefill rows a step; None: as many as fit
    mixed_steps: bool = True  # False: a step holds decode rows or prefill rows, and the two take turns
    max_query: int | None = None  # tokens a row; None: as many as fit
    max_prefill_tokens: int | None = None  # prefill tokens in a step that holds decode rows too; None: as many as fit

    @property
    def chunk(self) -> int:
        """The most tokens of one request in one step."""
        return self.token_budget if self.max_query is None else min(self.token_budget, self.max_query)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "mixed_steps" and value is not None and value < 1:
                raise InvalidValue(f"{name} = {value}: give a number of at least 1")


@dataclass(eq=False, slots=True)
class Row:
    """The tokens [start, start + count) of a request, computed in one step. Not to be changed.

    The last of them may be a token in flight, which is known only once the batch before is committed.
    """

    request: Request
    start: int
    count: int
    samples: bool  # whether the row ends at the request's last token, so that the next is sampled
    logits: int  # rows of logits, of its last tokens: all tokens of a scored prompt, else 1 if it samples, else 0
    epoch: int  # of the request


@dataclass(eq=False, slots=True)
class Batch:
    """One step: decode rows first, then prefill rows, each in the order of ranks. Not to be changed.

    Before the step runs, and after the one before it: pages are saved (`swaps_out`), then copied (`copies`), then
    brought back (`swaps_in`), each in the order given.
    """

    rows: tuple[Row, ...]
    copies: tuple[PageCopy, ...] = ()
    preempted: tuple[int, ...] = ()  # ids of requests that lost their pages to make room
    swaps_out: tuple[PageSwap, ...] = ()  # a page list for each group of a request
    swaps_in: tuple[PageSwap, ...] = ()  # the same lists with new ids, 0 where nothing is to be written
    finished: tuple[Request, ...] = ()  # requests that scheduling ended: their deadline passed, or they were rejected
    shared: tuple[tuple[int, bytes], ...] = ()  # what `CacheManager.share` gave for its prefills

    @property
    def tokens(self) -> int:
        """How many tokens the step computes."""
        return sum([row.count for row in self.rows])

    @property
    def moves_pages(self) -> bool:
        """Whether pages are to be copied or swapped before the step."""
        return bool(self.copies or self.swaps_out or self.swaps_in)

    @property
    def logits(self) -> int:
        """How many rows of logits the step gives."""
        return sum([row.logits for row in self.rows])

    @property
    def samples(self) -> int:
        """How many rows sample a token."""
        return sum([row.samples for row in self.rows])


class BatchBuilder:
    """A batch in the making, and the room that its limits leave."""

    def __init__(self, limits: Limits) -> None:
        self.rows: list[Row] = []
        self.copies: list[PageCopy] = []
        self.preempted: list[int] = []
        self.swaps_out: list[PageSwap] = []
        self.swaps_in: list[PageSwap] = []
        self.finished: list[Request] = []
        self.shared: list[tuple[int, bytes]] = []
        self.fresh: set[int] = set()  # ids of requests some of whose pages get their contents just before this step
        self.lacking = False  # whether some row was left out for want of pages
        self.tokens_left = limits.token_budget
        self.logits_left = limits.max_rows
        self._prefills_left = limits.token_budget if limits.max_prefill_rows is None else limits.max_prefill_rows
        self._limits = limits

    @property
    def takes_prefill(self) -> bool:
        """Whether there is room for at least one token of one more prefill row."""
        return self.tokens_left > 0 and self._prefills_left > 0

    def decoded(self) -> None:
        """Note that all rows so far are decode rows, of one token and one row of logits."""
        self.tokens_left -= len(self.rows)
        self.logits_left -= len(self.rows)
        if self.rows and self._limits.max_prefill_tokens is not None:
            self.tokens_left = min(self.tokens_left, self._limits.max_prefill_tokens)

    def add_prefill(self, request: Request) -> None:
        """Add as much of what a request has left to compute as there is room for, which may be nothing."""
        count = min(request.remaining, self.tokens_left, self._limits.chunk)
        scored = request.scores_prompt
        if scored:
            count = min(count, self.logits_left)
        elif count == request.remaining and not self.logits_left:
            count -= 1
        if count > 0:
            samples = count == request.remaining
            logits = count if scored else int(samples)
            self.rows.append(Row(request, request.scheduled, count, samples, logits, request.epoch))
            self.tokens_left -= count
            self.logits_left -= logits
            self._prefills_left -= 1
            request.scheduled += count
            request.in_flight += samples
            request.length += samples
            request.chunks += not samples

    def build(self) -> Batch:
        """Return the finished batch."""
        moved = tuple(self.swaps_out), tuple(self.swaps_in), tuple(self.finished), tuple(self.shared)
        return Batch(tuple(self.rows), tuple(self.copies), tuple(self.preempted), *moved)
