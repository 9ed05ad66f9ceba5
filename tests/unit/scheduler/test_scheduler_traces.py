"""The scheduler on random traces, with a shadow device in place of a model.

The device stores one value a position, through the page tables as they were when a step was scheduled, and reads back
all that the step's tokens see, so that a missing, stale or misplaced KV entry is seen. Outputs are compared with a run
without any cache.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Limits, Policy, Request, Row, Scheduler, Status

VOCABULARY = 11
EOS = frozenset((0,))


def mix(before: int, token: int) -> int:
    """Return the KV value of a position: a function of all tokens up to it."""
    return ((before ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**61


def next_token(value: int, fork: int) -> int:
    """Return what the model says after a position of this value."""
    return (value >> 20 + fork) % VOCABULARY


def reference(request: Request, limit: int) -> tuple[list[int], FinishReason]:
    """Generate with no cache and no scheduler. limit: tokens that prompt and output may reach."""
    value, output = len(request.salt), list[int]()
    for token in request.prompt:
        value = mix(value, token)
    while True:
        output.append(token := next_token(value, request.fork))
        if token in request.params.stop_token_ids or (token in EOS and not request.params.ignore_eos):
            return output, FinishReason.STOP
        if len(output) == request.params.max_tokens or len(request.prompt) + len(output) == limit:
            return output, FinishReason.LENGTH
        value = mix(value, token)


@dataclass
class Arrival:
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: bytes
    priority: int = 0
    patience: int | None = None  # steps until its deadline
    forks: int = 0  # further samples of the prompt


@dataclass
class Trace:
    """What is done to the scheduler: `None` is a step, an int cancels (in the middle of a step if it is negative)."""

    limits: Limits
    groups: list[GroupSpec]
    watermark: float
    events: list[Arrival | int | None]
    ahead: bool = False  # schedule each step before the one before it is committed
    policy: Policy = field(default_factory=Policy)
    swap_pages: int = 0
    eviction: str = "lru"

    @property
    def plain(self) -> bool:
        """Whether older requests go before younger ones in everything."""
        return self.policy == Policy() and not any(isinstance(e, Arrival) and e.forks for e in self.events)


@dataclass
class Packed:
    """A batch on its way, and the places of each row's positions in every group when it was scheduled."""

    batch: Batch
    places: list[list[list[tuple[int, int, int]]]]


def in_flight_rows(pending: list[Packed], request: Request) -> bool:
    return any(row.request is request for packed in pending for row in packed.batch.rows)


@dataclass
class Driver:
    """Plays a trace and checks everything that each step promises."""

    trace: Trace
    cache: CacheManager = field(init=False)
    scheduler: Scheduler = field(init=False)
    requests: list[Request] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    memory: dict[tuple[int, int, int], int] = field(default_factory=dict)
    pending: list[Packed] = field(default_factory=list)
    sampled: dict[tuple[int, int], int] = field(default_factory=dict)
    host: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict)
    clock: int = 0
    copies: int = 0
    unknown: int = 0  # rows that began at a token in flight
    shared_at_once: int = 0  # pages that a row writes and another row, opened on them, reads
    log: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        trace = self.trace
        self.cache = CacheManager(
            trace.groups, watermark=trace.watermark, chunk=trace.limits.chunk, eviction=trace.eviction,
            swap_pages=trace.swap_pages,
        )  # fmt: skip
        self.scheduler = Scheduler(trace.limits, self.cache, trace.policy)

    @property
    def limit(self) -> int:
        return min(self.trace.limits.max_model_len, self.cache.capacity + 1)

    def play(self) -> None:
        midstep: list[int] = []
        for event in self.trace.events:
            if isinstance(event, Arrival):
                self.arrive(event)
            elif event is None:
                self.step(midstep)
                midstep = []
            elif event < 0:
                midstep.append(-event)
            else:
                self.cancel(event)
        self.drain()

    def drain(self) -> None:
        work = sum(len(request.prompt) + request.params.max_tokens for request in self.requests)
        for _ in range(20 * work + 20):
            if not self.scheduler.has_work:
                break
            self.step([])
        assert not self.scheduler.has_work, "livelock"
        while self.pending:
            self.run([])
        assert [self.cache.used_pages(group) for group in range(len(self.trace.groups))] == [0] * len(self.trace.groups)
        self.check_ends()

    def arrive(self, arrival: Arrival) -> None:
        prompt = arrival.prompt[: self.limit - 1]
        deadline = None if arrival.patience is None else self.clock + arrival.patience
        parent = None
        for fork in range(arrival.forks + 1):
            request = Request(
                len(self.requests), prompt, arrival.params, EOS, arrival.salt, arrival.priority, self.clock, deadline,
                parent, fork,
            )  # fmt: skip
            parent = parent or request
            self.requests.append(request)
            self.scheduler.add(request)

    def cancel(self, number: int) -> None:
        if not self.requests:
            return
        target = number % len(self.requests)
        finished = self.requests[target].finished
        cancelled = self.scheduler.cancel(target)
        assert (cancelled is None) == finished
        if cancelled is not None:
            self.returned.append(target)

    def step(self, midstep: list[int]) -> None:
        """Schedule a batch; run and commit the one before it (ahead) or itself."""
        self.clock += 1
        if self.trace.ahead and self.clock % 97 == 0:
            self.scheduler.discard()
            self.pending.clear()
            self.host.clear()
        running = [request for request in self.requests if request.status is Status.RUNNING]
        decoding = {request.id for request in running if request.remaining == 1 and request.length < request.most}
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule(self.clock)
        self.returned += [request.id for request in batch.finished]
        self.check_batch(batch, decoding, had_work)
        self.unknown += sum(row.start >= len(row.request.tokens) for row in batch.rows)
        self.pending.append(Packed(batch, [self.pack(row) for row in batch.rows]))
        if not self.trace.ahead or len(self.pending) > 1 or not batch.rows:
            self.run(midstep)

    def run(self, midstep: list[int]) -> None:
        """Run the oldest batch on the shadow device and commit it."""
        packed = self.pending.pop(0)
        batch = packed.batch
        tokens = self.compute(packed)
        for number in midstep:
            self.cancel(number)
        finished = self.scheduler.commit(batch, tokens)
        self.returned += [request.id for request in finished]
        self.cache.check_integrity()
        rows = [(row.request.id, row.start, row.count) for row in batch.rows]
        self.log.append((rows, batch.copies, batch.preempted, tokens, [request.id for request in finished]))

    def check_batch(self, batch: Batch, decoding: set[int], had_work: bool) -> None:
        limits = self.trace.limits
        self.cache.check_integrity()
        in_flight = any(packed.batch.rows for packed in self.pending)
        ending = in_flight and any(request.length >= request.most for request in self.requests)
        assert bool(batch.rows) == had_work or in_flight or batch.finished, (
            "a step makes progress whenever there is work"
        )
        ids = [row.request.id for row in batch.rows]
        assert len(set(ids)) == len(ids) <= limits.max_rows and batch.tokens <= limits.token_budget
        assert batch.logits <= limits.max_rows
        prefills = [row for row in batch.rows if row.request.id not in decoding]
        decodes = len(ids) - len(prefills)
        left = {*decoding} - {*batch.preempted} - {request.id for request in batch.finished}
        assert not decodes or ending or {*ids} & decoding == left, "all that can decode do"
        assert decodes or not limits.mixed_steps or not left or in_flight, "mixed steps never leave decodes out"
        longer = prefills if self.trace.plain else [row for row in prefills if row.count > 1]
        assert limits.max_prefill_rows is None or len(longer) <= limits.max_prefill_rows
        most = limits.max_prefill_tokens
        assert most is None or not decodes or sum(row.count for row in prefills if row.count > 1) <= most
        assert limits.mixed_steps or not decodes or not prefills or not self.trace.plain
        assert not set(batch.preempted) & set(ids)
        if self.trace.plain:
            assert set(ids[:decodes]) <= decoding, "decode rows come first"
            assert ids[:decodes] == sorted(ids[:decodes]) and ids[decodes:] == sorted(ids[decodes:])
        for row in batch.rows:
            self.check_row(row)
        self.check_writes(batch)
        self.check_order()

    def check_row(self, row: Row) -> None:
        request, end = row.request, row.start + row.count
        assert 1 <= row.count <= (self.trace.limits.max_query or row.count)
        assert row.start == request.computed or in_flight_rows(self.pending, request), "rows follow each other"
        assert request.scheduled == end and row.samples == (end == request.length - row.samples)
        assert request.in_flight <= 1 + self.trace.ahead and end <= len(request.tokens) + request.in_flight
        scored = request.params.prompt_logprobs is not None and end <= len(request.prompt) and not request.output
        assert row.logits == (row.count if scored else row.samples)

    def check_writes(self, batch: Batch) -> None:
        """Who shares a page with the row that writes it computes later tokens only, in this step or after it."""
        starts = {request.id: request.scheduled for request in self.scheduler.running}
        starts |= {row.request.id: row.start for row in batch.rows}
        for group, spec in enumerate(self.trace.groups):
            ends: dict[int, list[int]] = {}
            for seq, start in starts.items():
                for index, page in enumerate(self.cache.pages(seq, group)):
                    ends.setdefault(page, []).append(start - index * spec.page_size)
            for row in batch.rows:
                pages = self.cache.pages(row.request.id, group)
                written = range(row.start // spec.page_size, (row.start + row.count - 1) // spec.page_size + 1)
                for index in written:
                    others = sorted(ends[pages[index]])[1:]
                    self.shared_at_once += len(others)
                    assert all(start >= spec.page_size for start in others), "a shared page is written"

    def check_order(self) -> None:
        running = [request.id for request in self.requests if request.status is Status.RUNNING]
        waiting = [request.id for request in self.requests if request.status is Status.WAITING]
        assert len(running) <= self.trace.limits.max_rows
        if self.trace.plain:
            assert not running or not waiting or max(running) < min(waiting), "older requests run first"
        assert self.cache.swap_pages_left >= 0
        assert (self.scheduler.stats.running, self.scheduler.stats.waiting) == (len(running), len(waiting))

    def pack(self, row: Row) -> list[list[tuple[int, int, int]]]:
        """Where the row sees each position, in each group that still lets it, by the page tables of now."""
        groups = enumerate(self.trace.groups)
        seen = [(group, row.start - spec.window if spec.window else -1) for group, spec in groups]
        ends = range(row.start + row.count)
        return [[self.place(row.request, group, at) for group, unseen in seen if at > unseen] for at in ends]

    def compute(self, packed: Packed) -> list[int]:
        """Run the step on the shadow device: pages out, copies, pages in, then all writes, then all reads."""
        batch = packed.batch
        for swap in batch.swaps_out:
            self.host[swap.seq, swap.group] = [self.load(swap.group, page) for page in swap.pages]
        self.copies += len(batch.copies)
        for copy in batch.copies:
            self.store(copy.group, copy.dst, self.load(copy.group, copy.src))
        for swap in batch.swaps_in:
            for page, values in zip(swap.pages, self.host.pop((swap.seq, swap.group)), strict=True):
                if page:
                    self.store(swap.group, page, values)
        values = [self.values(row) for row in batch.rows]
        rows = list(zip(batch.rows, packed.places, values, strict=True))
        for row, places, expected in rows:
            for position in range(row.start, row.start + row.count):
                for place in places[position]:
                    self.memory[place] = expected[position]
        for _, places, expected in rows:
            for position, value in enumerate(expected):
                assert {self.memory[place] for place in places[position]} <= {value}, "a token sees what is not its own"
        return [self.sample(row, expected[-1]) for row, _, expected in rows if row.samples]

    def load(self, group: int, page: int) -> list[int]:
        return [self.memory.get((group, page, i), -1) for i in range(self.trace.groups[group].page_size)]

    def store(self, group: int, page: int, values: list[int]) -> None:
        self.memory.update({(group, page, i): value for i, value in enumerate(values)})

    def values(self, row: Row) -> list[int]:
        """The KV values that a request's positions up to the row's end must have."""
        found, value = [], len(row.request.salt)
        for position in range(row.start + row.count):
            found.append(value := mix(value, self.token(row.request, position)))
        return found

    def sample(self, row: Row, value: int) -> int:
        token = next_token(value, row.request.fork)
        self.sampled[row.request.id, row.start + row.count] = token
        return token

    def token(self, request: Request, position: int) -> int:
        """A token of the request; one that was in flight is taken from the step that sampled it."""
        known = request.tokens
        return known[position] if position < len(known) else self.sampled[request.id, position]

    def place(self, request: Request, group: int, position: int) -> tuple[int, int, int]:
        size = self.trace.groups[group].page_size
        page = self.cache.pages(request.id, group)[position // size]
        assert page != 0
        return group, page, position % size

    def check_ends(self) -> None:
        assert sorted(self.returned) == list(range(len(self.requests))), "each request ends exactly once"
        for request in self.requests:
            output, reason = reference(request, self.limit)
            if request.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.REJECTED):
                assert request.output == output[: len(request.output)]
            else:
                assert (request.output, request.finish_reason) == (output, reason)


tokens = st.integers(0, VOCABULARY - 1)
SHARED = tuple(i % VOCABULARY for i in range(1, 40))
prompts = st.one_of(
    st.lists(tokens, min_size=1, max_size=30).map(tuple),
    st.tuples(st.integers(1, 30), st.lists(tokens, max_size=4)).map(lambda cut: (*SHARED[: cut[0]], *cut[1])),
)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 20),
    ignore_eos=st.sampled_from([True, True, False]),
    stop_token_ids=st.sampled_from([(), (), (3,)]),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)
salts = st.sampled_from([b"", b"", b"", b"salt"])
arrivals = st.builds(Arrival, prompts, sampling, salts)
cancels = st.integers(-12, 12)
events = st.lists(st.one_of(arrivals, arrivals, st.none(), st.none(), st.none(), cancels), min_size=3, max_size=60)
optional = st.one_of(st.none(), st.integers(1, 6))
limits_strategy = st.builds(
    Limits,
    token_budget=st.one_of(st.integers(1, 5), st.integers(6, 40)),
    max_rows=st.integers(1, 6),
    max_model_len=st.integers(2, 50),
    max_prefill_rows=optional,
    mixed_steps=st.booleans(),
    max_query=optional,
    max_prefill_tokens=optional,
)
group = st.builds(GroupSpec, pages=st.integers(4, 20), page_size=st.sampled_from([1, 2, 3, 4, 8]))
groups = st.lists(group, min_size=1, max_size=2)
traces = st.builds(Trace, limits_strategy, groups, st.sampled_from([0.0, 0.2]), events, st.booleans())


@settings(derandomize=True, max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces)
def test_every_trace_keeps_every_promise(trace: Trace) -> None:
    note(repr(trace.limits))
    Driver(trace).play()


policies = st.builds(
    Policy,
    admission=st.sampled_from(["fifo", "priority", "sjf"]),
    preemption=st.sampled_from(["recompute", "swap", "swap", "reject"]),
    aging=st.integers(1, 4),
    cache_aware=st.booleans(),
    fair_tenants=st.booleans(),
    straggler=st.sampled_from([None, 0.5, 2.0]),
)
choosy = st.builds(
    Arrival,
    prompts,
    sampling,
    salts,
    st.integers(0, 2),
    st.one_of(st.none(), st.none(), st.integers(0, 30)),
    st.sampled_from([0, 0, 0, 1, 2]),
)
choosy_events = st.lists(st.one_of(choosy, choosy, st.none(), st.none(), st.none(), cancels), min_size=3, max_size=60)
windowed = st.builds(
    GroupSpec,
    pages=st.integers(4, 20),
    page_size=st.sampled_from([1, 2, 3, 4, 8]),
    window=st.sampled_from([0, 0, 1, 3, 8]),
)
choosy_traces = st.builds(
    Trace,
    limits_strategy,
    st.lists(windowed, min_size=1, max_size=2),
    st.sampled_from([0.0, 0.2]),
    choosy_events,
    st.booleans(),
    policies,
    st.sampled_from([0, 3, 100]),
    st.sampled_from(["lru", "fifo", "lfu"]),
)


@settings(derandomize=True, max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(choosy_traces)
def test_every_policy_keeps_every_promise(trace: Trace) -> None:
    note(repr(trace.limits))
    Driver(trace).play()


def crowded(rng: random.Random) -> Trace:
    """Long outputs in tight pools, so that much is preempted, swapped, forked and given up."""

    def arrival() -> Arrival:
        prompt = tuple(rng.choice((SHARED, SHARED[::-1]))[: rng.randint(2, 20)])
        params = SamplingParams(
            max_tokens=rng.choice([2, 9, 20, 30]), ignore_eos=rng.random() < 0.8,
            prompt_logprobs=rng.choice([None] * 9 + [0]),
        )  # fmt: skip
        forks, patience = rng.choice([0, 0, 0, 1, 3]), rng.choice([None, None, None, rng.randint(5, 80)])
        return Arrival(prompt, params, rng.choice([b"", b"salt"]), rng.randint(0, 2), patience, forks)

    events: list[Arrival | int | None] = []
    for _ in range(rng.randint(6, 14)):
        events += [arrival(), *[None] * rng.randint(0, 12)]
        events += [rng.randint(-20, 20)] if rng.random() < 0.1 else []
    size = rng.choice([1, 2, 4])
    pages = rng.randint(30, 70) // size + 1
    groups = [GroupSpec(pages, size), GroupSpec(rng.randint(pages // 2, pages) + 2, size, rng.choice([0, 1, 4, 7]))]
    limits = Limits(
        rng.choice([7, 30]), rng.choice([3, 6]), 60, mixed_steps=rng.random() < 0.8, max_query=rng.choice([None, 3]),
        max_prefill_tokens=rng.choice([None, 4]),
    )  # fmt: skip
    policy = Policy(
        rng.choice(["fifo", "priority", "sjf"]), rng.choice(["recompute", "swap", "swap", "swap", "reject"]),
        rng.randint(1, 8), rng.random() < 0.3, rng.random() < 0.3, rng.choice([None, 0.3]),
    )  # fmt: skip
    eviction = rng.choice(["lru", "fifo", "lfu"])
    return Trace(limits, groups[: rng.randint(1, 2)], 0.0, events, rng.random() < 0.6, policy, 60, eviction)


def test_crowded_traces_keep_every_promise_and_everything_happens_in_them() -> None:
    happened = Counter[str]()
    for seed in range(400):
        driver = Driver(crowded(random.Random(seed)))
        driver.play()
        happened.update(vars(driver.scheduler.stats.counters))
        happened["forks"] += sum(
            len(set(request.prompt)) > 1 and request.cached == len(request.prompt) - 1 > 0
            for request in driver.requests
            if request.fork
        )
        happened["copies"] += driver.copies
        happened["pages shared by rows of one step"] += driver.shared_at_once
    print(happened)
    assert len(happened) == 10 and min(happened.values()) > 20


@settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(choosy_traces)
def test_the_same_trace_gives_the_same_batches(trace: Trace) -> None:
    first, second = Driver(trace), Driver(trace)
    first.play()
    second.play()
    assert first.log == second.log


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(arrivals, min_size=4, max_size=8), st.integers(5, 9), st.booleans(), st.booleans())
def test_preempted_requests_give_the_output_of_an_undisturbed_run(
    requests: list[Arrival], pages: int, mixed: bool, ahead: bool
) -> None:
    limits = Limits(token_budget=30, max_rows=8, max_model_len=200, mixed_steps=mixed)
    outputs = []
    for pool in (pages, 1000):
        prompts_that_fit = [Arrival(arrival.prompt[:8], arrival.params, arrival.salt) for arrival in requests]
        played = list[Arrival | int | None](prompts_that_fit)
        driver = Driver(Trace(limits, [GroupSpec(pool + 1, 6)], 0.0, played, ahead))
        driver.play()
        outputs.append([request.output for request in driver.requests])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("ahead", [False, True])
def test_these_traces_do_preempt_and_do_hit_prefixes(ahead: bool) -> None:
    """Guards the tests above against passing because nothing happens."""
    arrivals = [Arrival(SHARED[:7], SamplingParams(max_tokens=20, ignore_eos=True), b"") for _ in range(6)]
    limits = Limits(token_budget=30, max_rows=8, max_model_len=200)
    played = list[Arrival | int | None](arrivals)
    driver = Driver(Trace(limits, [GroupSpec(11, 4), GroupSpec(12, 3)], 0.0, played, ahead))
    driver.play()
    assert driver.scheduler.stats.preemptions >= 5
    assert driver.cache.stats.hit_tokens > 0 and driver.cache.stats.evictions > 0
    assert (driver.unknown > 20) == ahead
