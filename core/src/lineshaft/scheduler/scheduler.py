"""The scheduler: admits, batches, preempts and finishes requests, one step at a time.

Knows token counts, page counts and limits; it reads no clock and knows nothing of vendors, models or text.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import ceil
from operator import attrgetter

from lineshaft.cache import CacheManager, PageCopy, PrefixHashes
from lineshaft.errors import ContractViolation, EmptyPrompt, PromptTooLong
from lineshaft.scheduler.batch import Batch, BatchBuilder, Limits, Row
from lineshaft.scheduler.estimate import Estimator, Scores
from lineshaft.scheduler.policy import Policy, Queue
from lineshaft.scheduler.request import FinishReason, Request, Status

IN_FLIGHT = 2
"""Batches that may be uncommitted at once: one that runs, and the next, scheduled meanwhile."""
LOOKAHEAD = 16
"""How many waiting requests a cache-aware admission compares."""


@dataclass
class Counters:
    """What happened since the start."""

    preemptions: int = 0  # requests that lost their pages and go on later
    swaps: int = 0  # preemptions whose pages went to the host
    swap_fallbacks: int = 0  # preemptions that should have swapped and had to recompute: no room on the host
    rejected: int = 0
    expired: int = 0  # ended by their deadline
    stragglers: int = 0
    promoted: int = 0  # admitted out of rank because they waited longest


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot for metrics: requests now, counts since the start, and how good predictions were."""

    waiting: int
    running: int
    preemptions: int
    counters: Counters = field(default_factory=Counters)
    scores: Scores = field(default_factory=Scores)


class Scheduler:
    """Continuous batching. Use: `add`, then `schedule` and `commit` in turns.

    `schedule` may be called once more before the batch before it is committed (then the tokens of that batch are in
    flight); batches are committed in the order in which they were scheduled, and must run in it.

    Requests have ranks, which the policy gives: the lowest-ranked waiting one is admitted first, with pages for all its
    tokens, and the highest-ranked running one is preempted first. So the first in rank always moves on. The longest
    waiting one becomes the first in rank in time, so each is the first at last.
    """

    def __init__(self, limits: Limits, cache: CacheManager, policy: Policy | None = None) -> None:
        self.limits = limits
        self.cache = cache
        self.policy = policy or Policy()
        self.estimator = Estimator(limits.chunk, cache.pages_needed)
        # Every running request can have a decode row in one step.
        self._max_running = min(limits.max_rows, limits.token_budget)
        # The last token of a request needs no page: it is never computed.
        self._max_tokens = min(limits.max_model_len, cache.capacity + 1)
        self._queue = Queue(self.policy)
        self._parked: dict[int, list[Request]] = {}  # by the id of the parent whose prompt they wait for
        self._running: list[Request] = []
        self._requests: dict[int, tuple[Request, PrefixHashes]] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._uncommitted: deque[Batch] = deque()
        self._decode_turn = False
        self._added = 0
        self._counters = Counters()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def running(self) -> Sequence[Request]:
        """The requests that hold pages, in the order of their ranks: a live list, not to be changed."""
        return self._running

    @property
    def stats(self) -> SchedulerStats:
        """The counters, now."""
        waiting, counters = len(self._requests) - len(self._running), replace(self._counters)
        return SchedulerStats(waiting, len(self._running), counters.preemptions, counters, self.estimator.scores)

    # ---- requests ----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a new request. Raises EmptyPrompt, or PromptTooLong where no room for one output token could be."""
        assert request.id not in self._requests, f"request id {request.id} is taken"
        if not request.prompt:
            raise EmptyPrompt("the prompt has no tokens: give at least one")
        self._check_length(request.length)
        request.number, self._added = self._added, self._added + 1
        request.most = request.notable = min(len(request.prompt) + request.params.max_tokens, self._max_tokens)
        self._requests[request.id] = request, self.cache.hashes(request.salt)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, request.number, request))
        parent = request.parent
        if parent is not None and parent.id in self._requests and not parent.output:
            self._parked.setdefault(parent.id, []).append(request)
        else:
            self._enqueue(request)

    def cancel(self, request_id: int) -> Request | None:
        """Finish the request of this id as cancelled and return it; None if no unfinished request has the id."""
        if request_id not in self._requests:
            return None
        request, _ = self._requests[request_id]
        self.finish(request, FinishReason.CANCELLED)
        return request

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request and release its pages, also while a step that computes it is under way; once ended, no-op."""
        if request.finished:
            return
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self.cache.close(request.id)
        elif not self._unpark(request):
            self._queue.remove(request)
            if request.swapped:
                self.cache.close(request.id)
        request.status, request.finish_reason, request.stop_reason = Status.FINISHED, reason, stop_reason
        del self._requests[request.id]
        self._queue.charge(request, len(request.output))
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.estimator.learn(request)
        self._release_children(request)

    def _unpark(self, request: Request) -> bool:
        """Forget a request that waits for its parent; return whether it did."""
        waiting = self._parked.get(request.parent.id, []) if request.parent is not None else []
        if request not in waiting:
            return False
        waiting.remove(request)
        return True

    def _release_children(self, parent: Request) -> None:
        """Queue those that waited for this prompt: it is computed, or it never will be."""
        for child in self._parked.pop(parent.id, ()):
            self._enqueue(child)

    def _enqueue(self, request: Request) -> None:
        """Rank a request that waits, and queue it."""
        if self.policy.admission == "sjf" and request.cost is None:
            self._estimate(request, self._cached(request))
        request.rank = self.policy.rank(request)
        self._queue.push(request)

    def _estimate(self, request: Request, cached: int) -> None:
        request.cost = self.estimator.cost(request, cached)
        expected = self.estimator.known_output(request)
        if self.policy.straggler is not None and expected is not None and not request.straggling:
            request.notable = min(request.most, len(request.prompt) + ceil(self.policy.straggler * expected))

    def _cached(self, request: Request) -> int:
        """How many of its tokens a request need not compute if it is admitted now."""
        if request.swapped or self._forks(request):
            return request.swapped or len(request.prompt) - 1
        return 0 if request.scores_prompt else self.cache.cached(request.tokens, self._requests[request.id][1])

    # ---- steps -------------------------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> Batch:
        """Choose the next step: decode rows, then further chunks of running prefills, then new requests.

        now: seconds, on the clock of the requests' deadlines. At most one earlier batch may be uncommitted. A batch
        without rows needs no commit, and no step unless it moves pages; it comes only when there is no work but what
        the batch in flight is certain to end, or this call ended it.
        """
        assert len(self._uncommitted) < IN_FLIGHT, "two batches are uncommitted: commit the older one first"
        step = BatchBuilder(self.limits)
        self._expire(now, step)
        if self.policy.admission == "priority":
            self._make_way(step)
        if self.limits.mixed_steps or self._decode_turn:
            self._decode(step)
        decoding = bool(step.rows)
        if self.limits.mixed_steps or not decoding:
            self._continue_prefills(step)
            self._admit(step)
        if not step.rows:
            self._decode(step)
            decoding = True
        self._decode_turn = not decoding
        batch = step.build()
        if batch.rows:
            self._uncommitted.append(batch)
        return batch

    def commit(self, batch: Batch, tokens: Sequence[int]) -> list[Request]:
        """Book the oldest uncommitted batch, which has run: tokens has one entry for each row that samples, in order.

        Return the requests that this finished. What was finished or cancelled while the step ran is left alone.
        Raises ContractViolation, with nothing booked, for a wrong number of tokens or a negative one.
        """
        self._check_tokens(batch, tokens)
        if batch.rows:
            assert batch is self._uncommitted[0], "batches are committed in the order in which they were scheduled"
            self._uncommitted.popleft()
        due, given, finished = self.cache.due, iter(tokens), list[Request]()
        for row in batch.rows:
            request = row.request
            token = next(given) if row.samples else -1
            if request.status is Status.FINISHED:
                continue
            if row.epoch == request.epoch:
                request.computed = computed = row.start + row.count
                if computed >= due[request.id]:
                    self.cache.commit(request.id, request.tokens, computed)
            if token >= 0 and self._append(request, token):
                finished.append(request)
        return finished

    def discard(self) -> None:
        """Forget the uncommitted batches, which failed or never ran: all that has pages starts again, none is lost.

        Their pages are shared already, and so forgotten.
        """
        for request in self._running:
            self._close(request)
        self._running.clear()
        for request in self._queue.requests():
            if request.swapped:
                self.cache.close(request.id)
                request.swapped = 0
        for request, _ in self._requests.values():
            request.length -= request.in_flight
            request.in_flight = 0
        for batch in self._uncommitted:
            self.cache.forget(batch.shared)
        self._uncommitted.clear()

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn how long the step of a batch took."""
        if self.estimator.observe(batch, seconds) and self.policy.admission == "sjf":
            for request in self._queue.requests():
                self._queue.remove(request)
                request.cost = None
                self._enqueue(request)

    def _append(self, request: Request, token: int) -> bool:
        """Append a sampled token; return whether that finished the request."""
        request.output.append(token)
        request.in_flight -= 1
        if self._parked and len(request.output) == 1:
            self._release_children(request)
        if token in request.stops:
            self.finish(request, FinishReason.STOP, token)
        elif request.length - request.in_flight >= request.notable:
            self._note_length(request)
        return request.status is Status.FINISHED

    def _note_length(self, request: Request) -> None:
        """The output is as long as it may be, or so long that the request comes last from now on."""
        if request.length - request.in_flight >= request.most:
            self.finish(request, FinishReason.LENGTH)
            return
        request.notable, request.straggling = request.most, True
        self._counters.stragglers += 1
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self._run(request)
        else:
            self._queue.remove(request)
            self._enqueue(request)

    def _run(self, request: Request) -> None:
        """Put a request among the running ones, by its rank."""
        request.rank = self.policy.rank(request)
        insort(self._running, request, key=attrgetter("rank"))

    def _expire(self, now: float, step: BatchBuilder) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            self._end(heappop(self._deadlines)[-1], FinishReason.DEADLINE, step)

    def _end(self, request: Request, reason: FinishReason, step: BatchBuilder) -> None:
        """Finish a request from within `schedule`."""
        if not request.finished:
            self.finish(request, reason)
            step.finished.append(request)
            self._counters.expired += reason is FinishReason.DEADLINE
            self._counters.rejected += reason is FinishReason.REJECTED

    # ---- running requests --------------------------------------------------------------------------------------

    def _decode(self, step: BatchBuilder) -> None:
        """Give each running request that has one token left its row, in order of rank, preempting the last."""
        rows, writable = step.rows, self.cache.writable
        for request in self._running:  # shrinks at its end while it is walked
            start, length = request.scheduled, request.length
            if length - start != 1 or length >= request.most:
                continue
            if length <= writable[request.id] or self._grow(request, step):
                rows.append(Row(request, start, 1, True, 1, request.epoch))
                request.scheduled = length
                request.length = length + 1
                request.in_flight += 1
        step.decoded()

    def _continue_prefills(self, step: BatchBuilder) -> None:
        for request in self._running:  # shrinks at its end only while the step is empty
            if not step.takes_prefill:
                return
            if request.remaining > 1:
                if not self._has_chunk(request) and not self._grow(request, step):
                    step.lacking = True
                    return
                self._prefill(request, step)

    def _prefill(self, request: Request, step: BatchBuilder) -> None:
        """Give a request a chunk, whose pages are shared from the next admission on."""
        step.add_prefill(request)
        step.shared += self.cache.share(request.id, request.tokens, min(request.scheduled, len(request.tokens)))

    def _has_chunk(self, request: Request) -> bool:
        """Whether a request has pages for the most that a step computes of it; a group with a window may lack them."""
        return min(request.length, request.scheduled + self.limits.chunk) <= self.cache.writable[request.id]

    def _grow(self, request: Request, step: BatchBuilder) -> bool:
        """Make the request's next positions writable; False when it has to wait or that took preempting itself."""
        while (copies := self.cache.extend(request.id, request.length, start=request.scheduled)) is None:
            if self._uncommitted and any(running.length >= running.most for running in self._running):
                return False  # a commit is certain to end one, and frees its pages
            if request.remaining > 1 and step.rows:
                return False  # who would be preempted may have a row already
            last = self._running[-1]
            self._preempt(last, step)
            if last is request:
                return False
        step.copies += copies
        return True

    def _preempt(self, request: Request, step: BatchBuilder) -> None:
        """Take the last running request's pages, as the policy says."""
        if self.policy.preemption == "reject":
            step.lacking = True
            self._end(request, FinishReason.REJECTED, step)
            return
        self._running.remove(request)
        step.preempted.append(request.id)
        request.preemptions += 1
        self._counters.preemptions += 1
        if self.policy.preemption == "recompute" or not self._swap_out(request, step):
            self._close(request)

    def _swap_out(self, request: Request, step: BatchBuilder) -> bool:
        """Have the pages saved and queue the request; False where there is no room, or nothing worth to save yet."""
        worth = request.scheduled > 0 and request.id not in step.fresh
        swaps = self.cache.swap_out(request.id, request.scheduled) if worth else None
        if swaps is None:
            self._counters.swap_fallbacks += 1
            step.swaps_in = [swap for swap in step.swaps_in if swap.seq != request.id]
            return False
        step.swaps_out += swaps
        self._counters.swaps += 1
        request.swapped = request.scheduled
        self._wait(request)
        return True

    def _close(self, request: Request) -> None:
        """Give up the pages of a request that ran: it is computed again, from what the prefix cache still has."""
        self.cache.close(request.id)
        self._wait(request)

    def _wait(self, request: Request) -> None:
        """Queue a request that lost its pages."""
        request.status, request.computed, request.scheduled = Status.WAITING, 0, 0
        request.epoch += 1
        self._enqueue(request)

    # ---- admission ---------------------------------------------------------------------------------------------

    def _make_way(self, step: BatchBuilder) -> None:
        """Preempt running requests of lower priority for the first in line, if that is enough to admit it."""
        for head in self._queue.first():
            if not self._makes_room(head):
                return
            while len(self._running) == self._max_running or not self._start(head, step):
                last = self._running[-1]
                if last.promoted or last.priority <= head.priority:
                    return
                self._preempt(last, step)

    def _makes_room(self, head: Request) -> bool:
        """Whether a request has to, and can, take the place of running ones of lower priority."""
        lower = [running for running in self._running if running.priority > head.priority and not running.promoted]
        if not lower or self.policy.preemption == "reject" or len(self._running) - len(lower) >= self._max_running:
            return False
        free = sum(self.cache.free_pages(group) for group in range(len(self.cache.groups)))
        held = sum(self.cache.pages_held(running.id) for running in lower)
        return free + held >= self.cache.pages_needed(head.length)

    def _admit(self, step: BatchBuilder) -> None:
        """Admit waiting requests, the first in line until one does not fit; none while pages were lacking."""
        while len(self._running) < self._max_running and step.takes_prefill:
            request = self._choose()
            if request is None or step.preempted or step.lacking or not self._start(request, step):
                return
            self._prefill(request, step)

    def _choose(self) -> Request | None:
        """The next waiting request, or of the first few the one with the largest share of its prompt cached."""
        line = self._queue.first(LOOKAHEAD if self.policy.cache_aware else 1)
        if len(line) < 2:
            return line[0] if line else None
        equals = [r for r in line if r.priority == line[0].priority or self.policy.admission != "priority"]
        return max(equals, key=lambda request: self._cached(request) / request.length)

    def _start(self, request: Request, step: BatchBuilder) -> bool:
        """Give a waiting request its pages; False, with nothing changed, where they are lacking."""
        reserve = bool(self._running)
        start = self._restore if request.swapped else self._fork if self._forks(request, step.fresh) else self._open
        copies = start(request, reserve, step)
        if copies is None:
            return False
        step.copies += copies
        if copies:
            step.fresh.add(request.id)
        if not request.epoch:
            request.cached = request.computed
            self._estimate(request, request.cached)
        request.scheduled = request.computed
        request.status = Status.RUNNING
        aged = request.promoted
        self._queue.take(request)
        self._queue.charge(request, request.length - request.computed)
        self._counters.promoted += request.promoted and not aged
        self._run(request)
        return True

    def _open(self, request: Request, reserve: bool, step: BatchBuilder) -> list[PageCopy] | None:
        """Start on what the prefix cache has."""
        tokens, hashes, read = request.tokens, self._requests[request.id][1], not request.scores_prompt
        if not self.cache.can_admit(tokens, hashes, reserve=reserve, read=read):
            return None
        request.computed = self.cache.open(request.id, tokens, hashes=hashes, read=read)
        copies = self.cache.extend(request.id, request.length, reserve=reserve)
        assert copies == [], "an admissible request found no pages"
        return copies

    def _restore(self, request: Request, reserve: bool, step: BatchBuilder) -> list[PageCopy] | None:
        """Bring back what is on the host."""
        swaps = self.cache.swap_in(request.id, request.length, reserve=reserve)
        if swaps is None:
            return None
        step.swaps_in += swaps
        step.fresh.add(request.id)
        request.computed, request.swapped = request.swapped, 0
        return []

    def _fork(self, request: Request, reserve: bool, step: BatchBuilder) -> list[PageCopy] | None:
        """Start on the parent's pages of the prompt, its last token left out."""
        assert request.parent is not None
        shared = len(request.prompt) - 1
        if not self.cache.has_room(shared, request.length, reserve=reserve):
            return None
        self.cache.fork(request.parent.id, request.id, shared)
        request.computed = shared
        copies = self.cache.extend(request.id, request.length)
        assert copies is not None, "a fork that has room found no pages"
        return copies

    def _forks(self, request: Request, fresh: Iterable[int] = ()) -> bool:
        """Whether a request can start on the pages of its parent."""
        parent, shared = request.parent, len(request.prompt) - 1
        if parent is None or request.epoch or not shared or request.scores_prompt or parent.id in fresh:
            return False
        running = parent.status is Status.RUNNING and parent.computed >= shared
        return running and self.cache.can_fork(parent.id, shared)

    # ---- checks ------------------------------------------------------------------------------------------------

    def _check_tokens(self, batch: Batch, tokens: Sequence[int]) -> None:
        if len(tokens) != batch.samples:
            raise ContractViolation(
                f"a step of {batch.samples} sampling rows gave {len(tokens)} tokens: give one a row"
            )
        if tokens and min(tokens) < 0:
            sampling = [row.request for row in batch.rows if row.samples]
            for request, token in zip(sampling, tokens, strict=True):
                if token < 0 and not request.finished:
                    raise ContractViolation(f"request {request.id} got token {token}: finish it, or give an id >= 0")

    def _check_length(self, length: int) -> None:
        if length >= self.limits.max_model_len:
            raise PromptTooLong(
                f"the prompt has {length} tokens: the context of {self.limits.max_model_len} allows at most "
                f"{self.limits.max_model_len - 1} and one of output; shorten the prompt or raise max_model_len"
            )
        if length > self.cache.capacity:
            raise PromptTooLong(
                f"the prompt has {length} tokens: the KV pool holds {self.cache.capacity}; shorten the prompt or "
                "give the KV pool more memory"
            )
