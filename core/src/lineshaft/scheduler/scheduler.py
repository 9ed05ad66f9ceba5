"""The scheduler: admits, batches, preempts and finishes requests, one step at a time.

Knows token counts, page counts and limits; it reads no clock and knows nothing of vendors, models or text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lineshaft.cache import CacheManager, PageCopy, PrefixHashes
from lineshaft.errors import ContractViolation, EmptyPrompt, PromptTooLong
from lineshaft.scheduler.batch import Batch, BatchBuilder, Limits, Row
from lineshaft.scheduler.request import FinishReason, Request, Status


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot for metrics: requests now, and preemptions since the start."""

    waiting: int
    running: int
    preemptions: int


class Scheduler:
    """Continuous batching, first come, first served. Use: `add`, then `schedule` and `commit` in turns.

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
        self._decode_turn = False
        self._preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def stats(self) -> SchedulerStats:
        """The counters, now."""
        return SchedulerStats(len(self._waiting), len(self._running), self._preemptions)

    def add(self, request: Request) -> None:
        """Queue a new request. Raises EmptyPrompt, or PromptTooLong where no room for one output token could be."""
        assert request.id not in self._requests, f"request id {request.id} is taken"
        if not request.prompt:
            raise EmptyPrompt("the prompt has no tokens: give at least one")
        self._check_length(len(request.tokens))
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

        Each batch must be committed before the next is scheduled. A batch is empty only when there is no work.
        """
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
        return step.build()

    def commit(self, batch: Batch, tokens: Sequence[int]) -> list[Request]:
        """Book a step that has run: tokens has one entry for each row that samples, in order of rows.

        Return the requests that this finished. What was finished or cancelled while the step ran is left alone.
        Raises ContractViolation, with nothing booked, for a wrong number of tokens or a negative one.
        """
        sampled = [row for row in batch.rows if row.samples]
        if len(tokens) != len(sampled):
            raise ContractViolation(f"a step of {len(sampled)} sampling rows gave {len(tokens)} tokens: give one a row")
        for row, token in zip(sampled, tokens, strict=True):
            if token < 0 and not row.request.finished:
                raise ContractViolation(f"request {row.request.id} got token {token}: finish it, or give an id >= 0")
        self._book(batch.rows)
        return [row.request for row, token in zip(sampled, tokens, strict=True) if self._append(row.request, token)]

    def _decode(self, step: BatchBuilder) -> None:
        """Give each running request that has one token left its row, oldest first, preempting the youngest."""
        for request in self._running:  # shrinks at its end while it is walked
            if request.remaining == 1 and (copies := self._grow(request, step)) is not None:
                step.copies += copies
                step.add_decode(request)

    def _grow(self, request: Request, step: BatchBuilder) -> list[PageCopy] | None:
        """Make the request's last position writable; None when that took preempting the request itself."""
        while (copies := self.cache.extend(request.id, len(request.tokens))) is None:
            youngest = self._running[-1]
            self._preempt(youngest)
            step.preempted.append(youngest.id)
            if youngest is request:
                return None
        return copies

    def _preempt(self, request: Request) -> None:
        """Take the youngest running request's pages; it is computed again, from what the prefix cache still has."""
        self._running.pop()
        self._waiting.appendleft(request)
        self.cache.close(request.id)
        request.status, request.computed = Status.WAITING, 0
        request.preemptions += 1
        self._preemptions += 1

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
            reserve = bool(self._running)
            if step.preempted or not self.cache.can_admit(request.tokens, hashes, reserve=reserve):
                return
            request.computed = self.cache.open(request.id, request.tokens, hashes=hashes)
            copies = self.cache.extend(request.id, len(request.tokens), reserve=reserve)
            assert copies == [], "an admissible request found no pages"
            if not request.preemptions:
                request.cached = request.computed
            request.status = Status.RUNNING
            self._running.append(self._waiting.popleft())
            step.add_prefill(request)

    def _book(self, rows: Sequence[Row]) -> None:
        for row in rows:
            request = row.request
            if not request.finished:
                request.computed = row.start + row.count
                self.cache.commit(request.id, request.tokens, request.computed)

    def _append(self, request: Request, token: int) -> bool:
        """Append a sampled token; return whether that finished the request."""
        if request.finished:
            return False
        request.output.append(token)
        params = request.params
        if token in params.stop_token_ids or (token in request.eos_ids and not params.ignore_eos):
            self.finish(request, FinishReason.STOP, token)
        elif len(request.output) >= params.max_tokens or len(request.tokens) >= self._max_tokens:
            self.finish(request, FinishReason.LENGTH)
        return request.finished

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
