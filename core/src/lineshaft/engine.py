"""The engine: requests in, tokens out. Each step schedules, packs, executes and commits; it knows no array library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol

import numpy as np

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.config import EngineConfig
from lineshaft.contract.sessions import HostArray
from lineshaft.contract.steps import StepShape
from lineshaft.errors import InvalidSamplingParams, SessionClosed, TokenOutOfRange
from lineshaft.executors import Executor, agree, make_executor
from lineshaft.meter import Clock, Meter, median, now
from lineshaft.outputs import RunMetrics
from lineshaft.plan import Plan
from lineshaft.registry import Registry, discover
from lineshaft.runner.buckets import Need, fit
from lineshaft.runner.messages import ChoiceMessage, Logprobs, Sizes, StepMessage, StepResult
from lineshaft.runner.pack import Packed, need_of, pack_forward, pack_sampling
from lineshaft.runner.worker import Progress, silent
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Request, Scheduler

NO_COPIES = np.zeros((0, 3), np.int32)

Teacher = Callable[[Request, "np.ndarray[Any, Any]"], int | None]
"""Sees a request and the logits f32 [V] of its next token; a token id that it returns is taken instead of the sampled
one (teacher forcing, for evaluation). An id outside the vocabulary makes `step` raise TokenOutOfRange, and no request
gets a token of that step."""


@dataclass
class Replica:
    """One dp replica: its scheduler and its cache manager."""

    scheduler: Scheduler
    cache: CacheManager


@dataclass(slots=True)
class Live:
    """A request while it runs."""

    request: Request
    replica: int
    clock: Clock = field(default_factory=Clock)


@dataclass(slots=True)
class Token:
    """One token that a step gave to a request."""

    request: Request
    clock: Clock
    token_id: int  # -1: there is none, the request ended without
    logprobs: dict[int, tuple[float, int]] | None = None  # id -> (log-probability, rank; 0 = below those asked for)


@dataclass(slots=True)
class Flight:
    """A step of all replicas, from when it is scheduled until it is committed."""

    shape: StepShape
    batches: list[Batch]
    packed: list[Packed]
    began: float  # when its scheduling began, in seconds

    def sampled(self, replica: int) -> list[Request]:
        """The requests of a replica that get a token, in the order of their logit rows."""
        return [row.request for row in self.batches[replica].rows if row.samples]


class Recorder(Protocol):
    """Sees when each phase of a step began and ended, in seconds of `meter.now`."""

    def span(self, name: str, begin: float, end: float, **facts: int) -> None: ...


class Engine:
    """Runs requests of token ids to the end. Use `add`, then `step` while `has_work`; `close` at the end.

    `teacher`, if set, sees the logits of every sampled row and may overrule the token. `executor`, if given, runs the
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
        self._replicas = [self._make_replica() for _ in range(config.layout.dp)]
        self._live: dict[int, Live] = {}
        self._next_id = 0
        self._overlap = config.overlap == "on" or (config.overlap == "auto" and self._facts.asynchronous)
        self._flight: Flight | None = None  # submitted before the step that returns its tokens
        self._committed = 0.0
        self.recorder: Recorder | None = None
        self.closed = False

    def _make_replica(self) -> Replica:
        groups = [GroupSpec(n, size) for n, size in zip(self.pages, self._facts.page_sizes, strict=True)]
        settings = self.config.cache
        cache = CacheManager(groups, prefix_caching=settings.prefix_caching, watermark=settings.watermark)
        return Replica(Scheduler(self._facts.limits, cache), cache)

    # ---- requests ----------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._live) or self._flight is not None

    @property
    def plan(self) -> Plan:
        """The frozen choice of kernels, the same on every rank."""
        return self._facts.plan

    @property
    def caches(self) -> list[CacheManager]:
        """The cache manager of each dp replica, to be read only."""
        return [replica.cache for replica in self._replicas]

    def requests(self) -> list[Live]:
        """The unfinished requests, oldest first."""
        return list(self._live.values())

    @property
    def vocab(self) -> int:
        """Entries of the model's vocabulary."""
        return self._facts.vocab

    def add(
        self, prompt: Sequence[int], params: SamplingParams, eos_ids: frozenset[int] = frozenset(), salt: bytes = b""
    ) -> Request:
        """Queue a prompt. Raises EmptyPrompt, TokenOutOfRange, PromptTooLong, InvalidSamplingParams, SessionClosed."""
        self._require_open()
        self._check(prompt, params)
        request_id = self._next_id
        if params.seed is None:
            params = dataclasses.replace(params, seed=(self.config.seed + request_id) % 2**64)
        request = Request(request_id, tuple(map(int, prompt)), params, eos_ids, salt)
        replica = min(range(len(self._replicas)), key=lambda r: sum(x.replica == r for x in self._live.values()))
        self._replicas[replica].scheduler.add(request)
        self._live[request_id] = Live(request, replica)
        self._next_id += 1
        return request

    def _require_open(self) -> None:
        if self.closed:
            raise SessionClosed("the engine is closed; make a new one")

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        for token in prompt:
            self._check_token("prompt token", token)
        most = self.config.max_logprobs
        if params.logprobs is not None and (params.logprobs > most or not most):
            raise InvalidSamplingParams(
                f"logprobs = {params.logprobs}: the engine was made with max_logprobs = {self.config.max_logprobs}"
            )

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
        one is scheduled and packed while this one runs, and is on its way when this returns.
        """
        self._require_open()
        flight, self._flight = self._flight or self._launch(self._schedule()), None
        if flight is None:
            return []
        at, rows = now(), flight.shape.logits
        self._executor.choose([self._choice(flight.sampled(r), rows) for r in range(len(self._replicas))])
        self._mark("sample", flight, at)
        following = self._schedule() if self._overlap else None
        at = now()
        results = self._executor.collect()
        self._mark("run", flight, at)
        ids = [self._taught(flight.sampled(r), result) for r, result in enumerate(results)]
        if following is not None:
            self._fill(following, flight, ids)
            self._flight = self._launch(following)
        at = now()
        tokens = self._commit(flight, results, ids)
        self._mark("commit", flight, at)
        return tokens

    def _schedule(self) -> Flight | None:
        """The next step of every replica, packed; None where none has work."""
        began = now()
        batches = [replica.scheduler.schedule() for replica in self._replicas]
        need = reduce(Need.join, (need_of(batch.rows) for batch in batches))
        if not need.tokens:
            return None
        shape = fit(self._facts.shapes, need)
        flight = Flight(shape, batches, [], began)
        at = self._mark("schedule", flight, began)
        for replica, batch in zip(self._replicas, batches, strict=True):
            flight.packed.append(pack_forward(batch, replica.cache, self._facts.page_sizes, shape))
        self._mark("prepare", flight, at)
        return flight

    def _launch(self, flight: Flight | None) -> Flight | None:
        """Submit the forward of a step whose tokens are all known."""
        if flight is not None:
            at = now()
            parts = zip(flight.packed, flight.batches, strict=True)
            self._executor.submit([StepMessage(flight.shape, p.host, page_copies(b)) for p, b in parts])
            self._mark("run", flight, at)
        return flight

    def _fill(self, following: Flight, flight: Flight, ids: Sequence[Sequence[int]]) -> None:
        """Put the tokens of a step into the one that was scheduled before they were known."""
        for r, packed in enumerate(following.packed):
            packed.fill(dict(zip((request.id for request in flight.sampled(r)), ids[r], strict=True)))

    def _choice(self, sampled: Sequence[Request], rows: int) -> ChoiceMessage:
        return ChoiceMessage(
            pack_sampling(sampled, rows),
            logprobs=any(request.params.logprobs is not None for request in sampled),
            logits=self.teacher is not None,
        )

    def _taught(self, sampled: Sequence[Request], result: StepResult) -> list[int]:
        """The tokens that a replica's requests get, in the order of their logit rows."""
        ids: list[int] = result.token_ids[: len(sampled)].tolist()
        if self.teacher is None or result.logits is None:
            return ids
        for row, request in enumerate(sampled):
            forced = self.teacher(request, result.logits[row])
            if forced is not None:
                self._check_token(f"the teacher's token for request {request.id}", forced)
                ids[row] = int(forced)
        return ids

    def _commit(self, flight: Flight, results: Sequence[StepResult], ids: Sequence[list[int]]) -> list[Token]:
        """Book a step that has run. What ended while it ran gets no token."""
        tokens: list[Token] = []
        for r, (replica, batch) in enumerate(zip(self._replicas, flight.batches, strict=True)):
            for row in batch.rows:
                live = self._live.get(row.request.id)
                if live is not None and not live.clock.scheduled:
                    live.clock.scheduled = flight.began
            sampled = [self._live.get(request.id) for request in flight.sampled(r)]
            for live, token in zip(sampled, ids[r], strict=True):
                if token < 0 and live is not None:  # NaN logits: no token can be sampled; the others go on
                    replica.scheduler.finish(live.request, FinishReason.ERROR)
            replica.scheduler.commit(batch, ids[r])
            at = now()
            tokens += [self._token(live, row, ids[r][row], results[r], at) for row, live in enumerate(sampled) if live]
        self._book(flight, results, len(tokens))
        return tokens

    def _token(self, live: Live, row: int, token: int, result: StepResult, at: float) -> Token:
        if token >= 0:
            live.clock.token(at)
        if live.request.finished:
            self._retire(live)
        wanted, found = live.request.params.logprobs, None
        if wanted is not None and result.logprobs is not None and token >= 0:
            found = top_logprobs(result.logprobs, row, token, wanted)
        return Token(live.request, live.clock, token, found)

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
        used = sum(r.cache.used_pages(g) for r in self._replicas for g in range(len(self.pages)))
        self.meter.step(wall, kernels, single, sampled, used)

    def _mark(self, phase: str, flight: Flight, began: float) -> float:
        """Tell the recorder of a phase that ends now; return now."""
        at = now()
        if self.recorder is not None:
            rows = sum(len(batch.rows) for batch in flight.batches)
            self.recorder.span(phase, began, at, rows=rows, tokens=sum(batch.tokens for batch in flight.batches))
        return at

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
        self._executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def top_logprobs(found: Logprobs, row: int, token: int, wanted: int) -> dict[int, tuple[float, int]]:
    """The `wanted` likeliest tokens of a row and the chosen one: id -> (log-probability, rank)."""
    top = {
        int(i): (float(p), rank + 1) for rank, (i, p) in enumerate(zip(found.top_ids[row], found.top[row], strict=True))
    }
    kept = dict(list(top.items())[:wanted])
    kept[token] = top.get(token, (float(found.chosen[row]), 0))
    return kept


def page_copies(batch: Batch) -> HostArray:
    """The copies to make before a step, int32 [n, 3] of (group, src, dst)."""
    if not batch.copies:
        return NO_COPIES
    return np.array([(c.group, c.src, c.dst) for c in batch.copies], np.int32)
