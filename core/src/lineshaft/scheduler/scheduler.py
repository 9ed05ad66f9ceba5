"""The scheduler: admits, batches, preempts and finishes requests, one step at a time.

Knows token counts, page counts and limits; it reads no clock and knows nothing of vendors, models or text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lineshaft.cache import CacheManager, PrefixHashes
from lineshaft.errors import ContractViolation, EmptyPrompt, PromptTooLong
from lineshaft.scheduler.batch import Batch, BatchBuilder, Limits, Row
from lineshaft.scheduler.request import FinishReason, Request, Status

IN_FLIGHT = 2
"""Batches that may be uncommitted at once: one that runs, and the next, scheduled meanwhile."""


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot for metrics: requests now, and preemptions since the start."""

    waiting: int
    running: int
    preemptions: int


class Scheduler:
    """Continuous batching, first come, first served. Use: `add`, then `schedule` and `commit` in turns.

    `schedule` may be called once more before the batch before it is committed (then the tokens of that batch are in
    flight); batches are committed in the order in which they were scheduled, and must run in it.

    Running requests are all older than waiting ones: only the oldest waiting one is admitted, with pages for all its
    tokens, and only the youngest running one is preempted, to the front of the queue. So the oldest request always
    moves on, and each in its turn becomes the oldest.
    """

    def __init__(self, limits: Limits, cache: CacheManager) -> None:
        self.limits = limits
        self.cache = cache
        # Every running request can have a decode row in one step.
        self._max_running = min(limits.max_rows, limits.token_budget)
        # The last token of a request needs no page: it is never computed.
        self._max_tokens = min(limits.max_model_len, cache.capacity + 1)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._requests: dict[int, tuple[Request, PrefixHashes]] = {}
        self._uncommitted: deque[Batch] = deque()
        self._decode_turn = False
        self._preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def running(self) -> Sequence[Request]:
        """The requests that hold pages, oldest first: a live list, not to be changed."""
        return self._running

    @property
    def stats(self) -> SchedulerStats:
        """The counters, now."""
        return SchedulerStats(len(self._waiting), len(self._running), self._preemptions)

    def add(self, request: Request) -> None:
        """Queue a new request. Raises EmptyPrompt, or PromptTooLong where no room for one output token could be."""
        assert request.id not in self._requests, f"request id {request.id} is taken"
        if not request.prompt:
            raise EmptyPrompt("the prompt has no tokens: give at least one")
        self._check_length(request.length)
        request.most = min(len(request.prompt) + request.params.max_tokens, self._max_tokens)
        self._requests[request.id] = request, self.cache.hashes(request.salt)
        self._waiting.append(request)

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
        else:
            self._waiting.remove(request)
        request.status, request.finish_reason, request.stop_reason = Status.FINISHED, reason, stop_reason
        del self._requests[request.id]

    def schedule(self) -> Batch:
        """Choose the next step: decode rows, then further chunks of running prefills, then new requests.

        At most one earlier batch may be uncommitted. A batch without rows needs no step and no commit; it comes only
        when there is no work but what the batch in flight is certain to end.
        """
        assert len(self._uncommitted) < IN_FLIGHT, "two batches are uncommitted: commit the older one first"
        step = BatchBuilder(self.limits)
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
        """Forget the uncommitted batches, which failed or never ran: what was running starts again, none is lost."""
        self._uncommitted.clear()
        while self._running:
            self._release(self._running[-1])
        for request, _ in self._requests.values():
            request.length -= request.in_flight
            request.in_flight = 0

    def _decode(self, step: BatchBuilder) -> None:
        """Give each running request that has one token left its row, oldest first, preempting the youngest."""
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

    def _grow(self, request: Request, step: BatchBuilder) -> bool:
        """Make the request's last position writable; False when it has to wait or that took preempting itself."""
        while (copies := self.cache.extend(request.id, request.length)) is None:
            if self._uncommitted and any(running.length >= running.most for running in self._running):
                return False  # a commit is certain to end one, and frees its pages
            youngest = self._running[-1]
            self._preempt(youngest, step)
            if youngest is request:
                return False
        step.copies += copies
        return True

    def _preempt(self, request: Request, step: BatchBuilder) -> None:
        """Take the youngest running request's pages; it is computed again, from what the prefix cache still has."""
        self._release(request)
        request.preemptions += 1
        self._preemptions += 1
        step.preempted.append(request.id)

    def _release(self, request: Request) -> None:
        """Put the youngest running request back to the front of the queue, without its pages."""
        self._running.pop()
        self._waiting.appendleft(request)
        self.cache.close(request.id)
        request.status, request.computed, request.scheduled = Status.WAITING, 0, 0
        request.epoch += 1

    def _continue_prefills(self, step: BatchBuilder) -> None:
        for request in self._running:
            if not step.takes_prefill:
                return
            if request.remaining > 1:
                step.add_prefill(request)

    def _admit(self, step: BatchBuilder) -> None:
        """Admit waiting requests, oldest first, until one does not fit; none while pages were lacking."""
        while self._waiting and step.takes_prefill and len(self._running) < self._max_running:
            request = self._waiting[0]
            _, hashes = self._requests[request.id]
            reserve, tokens, read = bool(self._running), request.tokens, not request.scores_prompt
            if step.preempted or not self.cache.can_admit(tokens, hashes, reserve=reserve, read=read):
                return
            request.computed = request.scheduled = self.cache.open(request.id, tokens, hashes=hashes, read=read)
            copies = self.cache.extend(request.id, request.length, reserve=reserve)
            assert copies == [], "an admissible request found no pages"
            if not request.epoch:
                request.cached = request.computed
            request.status = Status.RUNNING
            self._running.append(self._waiting.popleft())
            step.add_prefill(request)

    def _append(self, request: Request, token: int) -> bool:
        """Append a sampled token; return whether that finished the request."""
        request.output.append(token)
        request.in_flight -= 1
        if token in request.stops:
            self.finish(request, FinishReason.STOP, token)
        elif request.length - request.in_flight >= request.most:
            self.finish(request, FinishReason.LENGTH)
        return request.status is Status.FINISHED

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
