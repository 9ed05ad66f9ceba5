"""The discrete-event loop: requests arrive, the real scheduler forms steps, and each takes its modelled time.

Every step is taken: with tens of rows a page border falls into almost every step, so there is next to nothing to skip.
"""

from __future__ import annotations

import gc
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

from lineshaft.cache import CacheManager
from lineshaft.errors import RequestError
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Request, Scheduler
from lineshaft_bench.simulator.cost import Load, Seen, StepCost
from lineshaft_bench.traces import Arrival

END_ID = (1 << 31) - 1
END = frozenset({END_ID})
"""The end-of-sequence token, which no content has."""


@dataclass(slots=True)
class Live:
    """A request on its way, with its moments in seconds."""

    arrival: Arrival
    left: int  # tokens that it will generate
    scheduled: float = -1.0
    last: float = -1.0  # token


def floats() -> array[float]:
    return array("d")


@dataclass
class Outcome:
    """What happened. Latencies are in seconds; those of whole requests are of the ones that got all their tokens."""

    ttft: array[float] = field(default_factory=floats)  # from arrival to the first token
    itl: array[float] = field(default_factory=floats)  # between two tokens of a request
    queue: array[float] = field(default_factory=floats)  # from arrival to the begin of the first step that computes it
    total: array[float] = field(default_factory=floats)  # from arrival to the last token
    seconds: float = 0.0  # simulated, to the end of the last step
    busy: float = 0.0  # in steps
    steps: int = 0
    rows: int = 0  # of all steps
    prompt_tokens: int = 0
    output_tokens: int = 0
    refused: int = 0  # requests that can never fit
    rejected: int = 0  # requests that ended for want of pages
    expired: int = 0  # requests that ended by their deadline
    page_seconds: float = 0.0  # share of pages held, times seconds in steps
    most_pages: float = 0.0  # share
    most_running: int = 0
    preemptions: int = 0
    swaps: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    evictions: int = 0


@lru_cache(maxsize=4096)
def params(max_tokens: int) -> SamplingParams:
    """At most so many tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


class Simulation:
    """One run of a trace. `scheduler` and `cache` are fresh, and belong to each other."""

    def __init__(
        self,
        scheduler: Scheduler,
        cache: CacheManager,
        cost: StepCost,
        *,
        overlap: bool = False,
        max_tokens: int | None = None,
        keep: bool = False,
    ) -> None:
        """overlap: schedule each step when the one before begins. max_tokens: what requests ask for, so that nobody
        knows when they end; None: exactly what they generate. keep: note every token's moment in `stamps`."""
        self.scheduler, self.cache, self.cost = scheduler, cache, cost
        self.stamps: dict[int, list[float]] | None = {} if keep else None
        self.now = 0.0
        self.outcome = Outcome()
        self._live: dict[int, Live] = {}
        self._groups = range(len(cache.groups))
        self._overlap, self._max_tokens = overlap, max_tokens or 0
        self._learns = scheduler.policy.admission == "sjf"
        self._following: Batch | None = None  # scheduled while the step before it runs
        self._pages = sum(group.pages - 1 for group in cache.groups)

    def run(self, arrivals: Sequence[Arrival]) -> Outcome:
        """Run all requests to their ends."""
        waiting = deque(enumerate(arrivals))
        with collecting_less():
            while waiting or self._live:
                while waiting and waiting[0][1].at <= self.now:
                    self._add(*waiting.popleft())
                if self._live:
                    self._step()
                elif waiting:
                    self.now = waiting[0][1].at
        return self._finished()

    def _add(self, number: int, arrival: Arrival) -> None:
        deadline = None if arrival.deadline_s is None else arrival.at + arrival.deadline_s
        request = Request(
            number, arrival.token_ids(), params(max(arrival.output_tokens, self._max_tokens)), END,
            priority=arrival.priority, arrival=arrival.at, deadline=deadline,
        )  # fmt: skip
        try:
            self.scheduler.add(request)
        except RequestError:
            self.outcome.refused += 1
            return
        self._live[number] = Live(arrival, arrival.output_tokens)
        self.outcome.prompt_tokens += len(request.prompt)

    def _schedule(self) -> Batch | None:
        """The next step, without those that scheduling ended; None where nothing is to be computed."""
        batch = self.scheduler.schedule(self.now)
        for request in batch.finished:
            del self._live[request.id]
            expired = request.finish_reason is FinishReason.DEADLINE
            self.outcome.expired += expired
            self.outcome.rejected += not expired
        return batch if batch.rows else None

    def _step(self) -> None:
        batch = self._following or self._schedule()
        if batch is None:
            return
        self._following = self._schedule() if self._overlap else None
        began, seconds = self.now, self.cost.seconds(load_of(batch, self.cache))
        sampled, tokens = list[Live](), list[int]()
        for row in batch.rows:
            own = self._live.get(row.request.id)
            if own is None:  # it ended while this step was on its way
                tokens += [END_ID] * row.samples
                continue
            if own.scheduled < 0:
                own.scheduled = began
            if row.samples:
                own.left -= 1
                sampled.append(own)
                tokens.append(own.arrival.reply if own.left else END_ID)
        self._note(seconds, len(batch.rows))
        self.now = began + seconds
        if self.stamps is not None:
            self._keep(batch)
        finished = self.scheduler.commit(batch, tokens)
        if self._learns:
            self.scheduler.observe(batch, seconds)
        self._emit(sampled)
        for request in finished:
            self._retire(self._live.pop(request.id))

    def _keep(self, batch: Batch) -> None:
        assert self.stamps is not None
        for row in batch.rows:
            if row.samples and row.request.id in self._live:
                self.stamps.setdefault(row.request.id, []).append(self.now)

    def _emit(self, sampled: Sequence[Live]) -> None:
        outcome, now = self.outcome, self.now
        for own in sampled:
            if own.last < 0:
                outcome.ttft.append(now - own.arrival.at)
            else:
                outcome.itl.append(now - own.last)
            own.last = now
        outcome.output_tokens += len(sampled)

    def _note(self, seconds: float, rows: int) -> None:
        outcome, held = self.outcome, sum(map(self.cache.used_pages, self._groups)) / self._pages
        outcome.steps += 1
        outcome.busy += seconds
        outcome.rows += rows
        outcome.page_seconds += held * seconds
        outcome.most_pages = max(outcome.most_pages, held)
        outcome.most_running = max(outcome.most_running, rows)

    def _retire(self, own: Live) -> None:
        outcome, arrival = self.outcome, own.arrival
        outcome.queue.append(own.scheduled - arrival.at)
        outcome.total.append(self.now - arrival.at)

    def _finished(self) -> Outcome:
        outcome, stats = self.outcome, self.cache.stats
        outcome.seconds = self.now
        counters = self.scheduler.stats.counters
        outcome.preemptions, outcome.swaps = counters.preemptions, counters.swaps
        outcome.hit_tokens, outcome.queried_tokens = stats.hit_tokens, stats.queried_tokens
        outcome.evictions = stats.evictions
        return outcome


def load_of(batch: Batch, cache: CacheManager) -> Load:
    """The work of a step."""
    tokens = context = logits = longest = 0
    pairs = 0.0
    for row in batch.rows:
        count, end = row.count, row.start + row.count
        tokens += count
        context += end
        if count > longest:
            longest = count
        pairs += end if count == 1 else count * (row.start + end + 1) / 2
        logits += row.samples
    swapped = 0
    if batch.swaps_out or batch.swaps_in:
        moved = [*batch.swaps_out, *batch.swaps_in]
        swapped = sum(sum(map(bool, swap.pages)) * cache.groups[swap.group].page_size for swap in moved)
    seen = {group.window: within(group.window, batch) for group in cache.groups if group.window}
    return Load(len(batch.rows), tokens, context, pairs, logits, longest, swapped, seen)


def within(window: int, batch: Batch) -> Seen:
    """What attention reads and computes where a query sees so many keys at most."""
    context, pairs = 0, 0.0
    for row in batch.rows:
        start, end = row.start, row.start + row.count
        context += min(end, window + row.count - 1)
        full = max(0, end - max(start, window))  # queries that see a whole window
        pairs += full * window + (row.count - full) * (start + 1 + end - full) / 2
    return context, pairs


@contextmanager
def collecting_less() -> Iterator[None]:
    """Garbage is collected seldom: a simulation makes many small objects and next to no cycles."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
