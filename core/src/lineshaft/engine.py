"""The engine: requests in, tokens out. Each step schedules, packs, executes and commits; it knows no array library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import numpy as np

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.config import EngineConfig
from lineshaft.errors import InvalidSamplingParams, RequestError, SessionClosed, TokenOutOfRange
from lineshaft.executors import Executor, agree, make_executor
from lineshaft.flight import Flight, Live, Token, token_of
from lineshaft.meter import Clock, Meter, median, now
from lineshaft.outputs import RunMetrics
from lineshaft.plan import Plan
from lineshaft.registry import Registry, discover
from lineshaft.runner.buckets import Need, fit
from lineshaft.runner.messages import ChoiceMessage, Sizes, StepResult
from lineshaft.runner.pack import Place, need_of, pack_forward
from lineshaft.runner.worker import Progress, silent
from lineshaft.sampling.choice import make_choice
from lineshaft.sampling.logprobs import PromptLogprobs
from lineshaft.sampling.params import EXTRAS, SamplingParams, check_extras
from lineshaft.sampling.vocabulary import Vocabulary
from lineshaft.scheduler import Batch, FinishReason, Policy, Request, Scheduler

Teacher = Callable[[Request, "np.ndarray[Any, Any]"], int | None]
"""Sees a request and the logits f32 [V] of its next token; a token id that it returns is taken instead of the sampled
one (teacher forcing, for evaluation). An id outside the vocabulary makes `step` raise TokenOutOfRange, and no request
gets a token of that step."""


@dataclass
class Replica:
    """One dp replica: its scheduler and its cache manager."""

    scheduler: Scheduler
    cache: CacheManager


class Recorder(Protocol):
    """Sees when each phase of a step began and ended, in seconds of `meter.now`."""

    def span(self, name: str, begin: float, end: float, **facts: int) -> None: ...


class Engine:
    """Runs requests of token ids to the end. Use `add`, then `step` while `has_work`; `close` at the end.

    `teacher`, if set, sees the logits of every sampled row and may overrule the token. `vocabulary`, if set, serves
    requests that ask for a structured output. `executor`, if given, runs the
    steps in the place of the configured one, and is closed with the engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        registry: Registry | None = None,
        progress: Progress = silent,
        executor: Executor | None = None,
    ) -> None:
        registry = registry or discover()
        self.config = config
        self.teacher: Teacher | None = None
        self.vocabulary: Vocabulary | None = None
        self.meter = Meter()
        self._executor = executor or make_executor(config, registry)
        try:
            sizes = self._executor.size()
            self.pages = agree(sizes)
            self._facts: Sizes = sizes[0]
            self.started = self._executor.start(self.pages, progress)
        except BaseException:
            self._executor.close()
            raise
        off = "the engine was made with sampling_extras = false; set it to true"
        self._declined = self.plan.declined if config.sampling_extras else dict.fromkeys(EXTRAS, off)
        self._replicas = [self._make_replica() for _ in range(config.layout.dp)]
        self._live: dict[int, Live] = {}
        self._next_id = 0
        beside = self._facts.asynchronous or self._executor.beside
        self._overlap = config.overlap == "on" or (config.overlap == "auto" and beside)
        self._ended: list[Token] = []  # requests that scheduling ended, which `step` has not returned yet
        self._flight: Flight | None = None  # submitted before the step that returns its tokens
        self._committed = 0.0
        self._mask_thread = ThreadPoolExecutor(1, "lineshaft-masks")  # where the forward runs in this one
        self.recorder: Recorder | None = None
        self._stepping = False
        self.closed = False

    def _make_replica(self) -> Replica:
        sizes = zip(self.pages, self._facts.page_sizes, self._facts.windows, strict=True)
        settings, chosen, limits = self.config.cache, self.config.scheduler, self._facts.limits
        cache = CacheManager(
            [GroupSpec(*size) for size in sizes], prefix_caching=settings.prefix_caching, watermark=settings.watermark,
            chunk=limits.chunk, eviction=settings.eviction, swap_pages=chosen.swap_pages,
        )  # fmt: skip
        policy = Policy(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Policy)})
        return Replica(Scheduler(limits, cache, policy), cache)

    # ---- requests ----------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._live) or self._flight is not None or bool(self._ended)

    @property
    def plan(self) -> Plan:
        """The frozen choice of kernels, the same on every rank."""
        return self._facts.plan

    @property
    def caches(self) -> list[CacheManager]:
        """The cache manager of each dp replica, to be read only."""
        return [replica.cache for replica in self._replicas]

    @property
    def schedulers(self) -> list[Scheduler]:
        """The scheduler of each dp replica, to be read only."""
        return [replica.scheduler for replica in self._replicas]

    def requests(self) -> list[Live]:
        """The unfinished requests, oldest first."""
        return list(self._live.values())

    @property
    def vocab(self) -> int:
        """Entries of the model's vocabulary."""
        return self._facts.vocab

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_ids: frozenset[int] = frozenset(),
        salt: bytes = b"",
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        parent: Request | None = None,
        fork: int = 0,
    ) -> Request:
        """Queue a prompt.

        salt        requests share cached prefixes only under an equal one
        priority    lower runs first
        deadline_s  seconds from now after which the request ends, wherever it is
        parent      a request of the same prompt, of which this is sample number `fork`, from 1 on: it shares the
                    parent's pages and, where it brings none, its seed

        Raises EmptyPrompt, TokenOutOfRange, PromptTooLong, InvalidSamplingParams, SessionClosed, and RequestError for
        another prompt or salt than the parent's.
        """
        self._require_open()
        if params.truncate_prompt_tokens is not None:
            prompt = prompt[-params.truncate_prompt_tokens :]
        self._check(prompt, params)
        if parent is not None:
            if parent.prompt != tuple(prompt) or parent.salt != salt:
                raise RequestError("a parent of another prompt or salt: give the same for all samples of a prompt")
            params = dataclasses.replace(params, prompt_logprobs=None)
        choice = make_choice(params, prompt, self.vocab, eos_ids, self.vocabulary)
        request_id, clock = self._next_id, Clock()
        if params.seed is None:
            seed = (self.config.seed + request_id) % 2**64 if parent is None else parent.params.seed
            params = dataclasses.replace(params, seed=seed)
        deadline = None if deadline_s is None else clock.arrived + deadline_s
        request = Request(
            request_id, tuple(map(int, prompt)), params, eos_ids, salt, priority=priority, arrival=clock.arrived,
            deadline=deadline, parent=parent, fork=fork,
        )  # fmt: skip
        replica = self._replica_for(parent)
        self._replicas[replica].scheduler.add(request)
        wanted = params.prompt_logprobs
        scores = None if wanted is None else PromptLogprobs(request.prompt, wanted)
        self._live[request_id] = Live(request, replica, clock, choice, scores)
        self._next_id += 1
        return request

    def _replica_for(self, parent: Request | None) -> int:
        """The replica of the parent, whose pages are there; else the one with the fewest requests."""
        relative = None if parent is None else self._live.get(parent.id)
        if relative is not None:
            return relative.replica
        counts = [0] * len(self._replicas)
        for live in self._live.values():
            counts[live.replica] += 1
        return counts.index(min(counts))

    def _require_open(self) -> None:
        if self.closed:
            raise SessionClosed("the engine is closed; make a new one")

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        for token in prompt:
            self._check_token("prompt token", token)
        most = self.config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and (wanted > most or not most):
                raise InvalidSamplingParams(f"{name} = {wanted}: the engine was made with max_logprobs = {most}")
        check_extras(params, self._declined)

    def _check_token(self, what: str, token: object) -> None:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < self.vocab:
            raise TokenOutOfRange(f"{what} {token!r}: ids are whole numbers from 0 to {self.vocab - 1}")

    def cancel(self, request_id: int) -> None:
        """End a request; no-op if it is not running."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._replicas[live.replica].scheduler.cancel(request_id)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request for a reason that only the text shows (a stop string)."""
        live = self._live[request.id]
        self._replicas[live.replica].scheduler.finish(request, reason, stop_reason)
        self._retire(live)

    # ---- the step ----------------------------------------------------------------------------------------------

    def step(self) -> list[Token]:
        """Run until the tokens of one step are known, and return them.

        Every replica schedules, all run the same bucket, each commits what it sampled. Where steps overlap, the next
        one is scheduled and packed while this one runs, and is on its way when this returns. Raises RequestError where
        a logits processor or a teacher calls it.
        """
        self._require_open()
        if self._stepping:
            raise RequestError("a step is under way: a logits processor or teacher cannot wait for another request")
        self._stepping = True
        try:
            tokens = self._step() + self._ended
            self._ended = []
            return tokens
        except BaseException:
            self._flight = None
            for replica in self._replicas:
                replica.scheduler.discard()
            raise
        finally:
            self._stepping = False

    def _step(self) -> list[Token]:
        flight, self._flight = self._flight or self._launch(self._schedule()), None
        if flight is None:
            return []
        at = now()
        self._executor.choose(self._choices(flight) if flight.masks is None else flight.masks.result())
        self._mark("sample", flight, at)
        following = self._schedule() if self._overlap else None
        at = now()
        results = flight.processed(self._executor.collect())
        self._mark("run", flight, at)
        ids = [self._taught(sampled, result) for sampled, result in zip(flight.sampled, results, strict=True)]
        if following is not None:
            following.fill(flight, ids)
            self._flight = self._launch(following)
        at = now()
        tokens = self._commit(flight, results, ids)
        self._mark("commit", flight, at)
        return tokens

    def _schedule(self) -> Flight | None:
        """The next step of every replica, packed; None where none has work."""
        began = now()
        batches = [replica.scheduler.schedule(began) for replica in self._replicas]
        self._ended += [self._end(request) for batch in batches for request in batch.finished]
        need = reduce(Need.join, (need_of(batch.rows) for batch in batches))
        if not need.tokens and not any(batch.moves_pages for batch in batches):
            return None
        shape, at = fit(self._facts.shapes, need), now()
        parts = zip(self._replicas, batches, strict=True)
        packed = [pack_forward(batch, replica.cache, self._facts.page_sizes, shape) for replica, batch in parts]
        flight = Flight(shape, batches, packed, began)
        self._mark("schedule", flight, began, at)
        self._mark("prepare", flight, at)
        return flight

    def _launch(self, flight: Flight | None) -> Flight | None:
        """Submit the forward of a step whose tokens are all known."""
        if flight is not None:
            at = now()
            if not self._overlap and flight.masked(self._live):
                flight.masks = self._mask_thread.submit(self._choices, flight)
            self._executor.submit(flight.messages())
            self._mark("run", flight, at)
        return flight

    def _choices(self, flight: Flight) -> list[ChoiceMessage]:
        return flight.choices(self._live, self.vocab, logits=self.teacher is not None)

    def _taught(self, sampled: Sequence[Place], result: StepResult) -> list[int]:
        """The token of each request that gets one."""
        given = result.token_ids.tolist()
        ids = [given[row] for row, _ in sampled]
        if self.teacher is None or result.logits is None:
            return ids
        for index, (row, request) in enumerate(sampled):
            forced = self.teacher(request, result.logits[row])
            if forced is not None:
                self._check_token(f"the teacher's token for request {request.id}", forced)
                ids[index] = int(forced)
        return ids

    def _commit(self, flight: Flight, results: Sequence[StepResult], ids: Sequence[list[int]]) -> list[Token]:
        """Book a step that has run. What ended while it ran gets no token."""
        tokens: list[Token] = []
        flight.book_prompts(results, self._live)
        for replica, batch, sampled, result, given in zip(
            self._replicas, flight.batches, flight.sampled, results, ids, strict=True
        ):
            self._note_start(batch, flight.began)
            for (_, request), token in zip(sampled, given, strict=True):
                if token < 0:  # NaN logits: no token can be sampled; the others go on
                    replica.scheduler.finish(request, FinishReason.ERROR)
            replica.scheduler.commit(batch, given)
            at = now()
            for (row, request), token in zip(sampled, given, strict=True):
                live = self._live.get(request.id)
                if live is not None:
                    tokens.append(self._token(live, row, token, result, at))
        self._book(flight, results, sum(token.token_id >= 0 for token in tokens))
        return tokens

    def _note_start(self, batch: Batch, began: float) -> None:
        for row in batch.rows:
            live = self._live.get(row.request.id)
            if live is not None and not live.clock.scheduled:
                live.clock.scheduled = began

    def _token(self, live: Live, row: int, token: int, result: StepResult, at: float) -> Token:
        request = live.request
        if token >= 0:
            live.clock.token(at)
            if live.choice is not None and not request.finished and live.choice.token(token):
                self._replicas[live.replica].scheduler.finish(request, FinishReason.STOP)
        if request.finished:
            self._retire(live)
        return token_of(live, row, token, result)

    def _end(self, request: Request) -> Token:
        """Retire a request that scheduling ended."""
        live = self._live[request.id]
        self._retire(live)
        return Token(request, live.clock, -1)

    def _retire(self, live: Live) -> None:
        request = live.request
        del self._live[request.id]
        self.meter.request(live.clock.metrics(request.cached, request.preemptions), len(request.prompt))

    def _book(self, flight: Flight, results: Sequence[StepResult], sampled: int) -> None:
        wall = now() - max(flight.began, self._committed)
        self._committed = now()
        tokens = sum(batch.tokens for batch in flight.batches)
        single = tokens == 1 and all(len(batch.rows) <= 1 for batch in flight.batches)
        kernels = max(result.kernel_seconds for result in results)
        for replica, batch in zip(self._replicas, flight.batches, strict=True):
            if batch.rows:
                replica.scheduler.observe(batch, wall)
        used = sum(r.cache.used_pages(g) for r in self._replicas for g in range(len(self.pages)))
        self.meter.step(wall, kernels, single, sampled, used)

    def _mark(self, phase: str, flight: Flight, began: float, ended: float | None = None) -> None:
        """Tell the recorder of a phase, which ends now unless said otherwise."""
        if self.recorder is not None:
            rows, tokens = (sum(len(b.rows) for b in flight.batches), sum(b.tokens for b in flight.batches))
            self.recorder.span(phase, began, now() if ended is None else ended, rows=rows, tokens=tokens)

    # ---- the end -----------------------------------------------------------------------------------------------

    def metrics(self) -> RunMetrics:
        """What the engine did so far."""
        meter = self.meter
        stats = [replica.cache.stats for replica in self._replicas]
        return RunMetrics(
            requests=meter.requests,
            prompt_tokens=meter.prompt_tokens,
            output_tokens=meter.output_tokens,
            ttft_s=median(meter.ttft),
            tpot_s=median(meter.tpot),
            tokens_per_s=meter.output_tokens / meter.seconds if meter.seconds else 0.0,
            host_ms_per_decode_step=1e3 * median(meter.host),
            kernel_ms_per_decode_step=1e3 * median(meter.kernels),
            steps=meter.steps,
            preemptions=sum(replica.scheduler.stats.preemptions for replica in self._replicas),
            prefix_hit_tokens=sum(s.hit_tokens for s in stats),
            pages_used=meter.pages_used,
            pages_total=sum(n - 1 for n in self.pages) * len(self._replicas),
            page_size=self._facts.page_sizes[0] if self._facts.page_sizes else 0,
            load_s=max(s.load_seconds for s in self.started),
            capture_s=max(s.capture_seconds for s in self.started),
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError if any cache manager's books do not balance."""
        for replica in self._replicas:
            replica.cache.check_integrity()

    def close(self) -> None:
        """Idempotent: cancels what runs and ends every worker."""
        self.closed = True
        for request_id in list(self._live):
            self.cancel(request_id)
        self._flight, self._ended = None, []
        self._mask_thread.shutdown()
        self._executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
