"""The scheduler on random traces, with a shadow device in place of a model.

The device stores one value a position and computes the next token from the values that it reads back through the
pages, so a missing, stale or misplaced KV entry changes the output, which is compared with a run without any cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Limits, Request, Scheduler, Status

VOCABULARY = 11
EOS = frozenset((0,))


def mix(before: int, token: int) -> int:
    """Return the KV value of a position: a function of all tokens up to it."""
    return ((before ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**61


def next_token(value: int) -> int:
    """Return what the model says after a position of this value."""
    return (value >> 20) % VOCABULARY


def reference(request: Request, limit: int) -> tuple[list[int], FinishReason]:
    """Generate with no cache and no scheduler. limit: tokens that prompt and output may reach."""
    value, output = len(request.salt), list[int]()
    for token in request.prompt:
        value = mix(value, token)
    while True:
        output.append(token := next_token(value))
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


@dataclass
class Trace:
    """What is done to the scheduler: `None` is a step, an int cancels (in the middle of a step if it is negative)."""

    limits: Limits
    groups: list[GroupSpec]
    watermark: float
    events: list[Arrival | int | None]


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
    log: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = CacheManager(self.trace.groups, watermark=self.trace.watermark)
        self.scheduler = Scheduler(self.trace.limits, self.cache)

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
        assert [self.cache.used_pages(group) for group in range(len(self.trace.groups))] == [0] * len(self.trace.groups)
        self.check_ends()

    def arrive(self, arrival: Arrival) -> None:
        prompt = arrival.prompt[: self.limit - 1]
        self.requests.append(Request(len(self.requests), prompt, arrival.params, EOS, arrival.salt))
        self.scheduler.add(self.requests[-1])

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
        running = [request for request in self.requests if request.status is Status.RUNNING]
        decoding = {request.id for request in running if request.remaining == 1}
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule()
        self.check_batch(batch, decoding, had_work)
        tokens = self.compute(batch)
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
        assert bool(batch.rows) == had_work, "a step makes progress whenever there is work"
        ids = [row.request.id for row in batch.rows]
        assert len(set(ids)) == len(ids) <= limits.max_rows and batch.tokens <= limits.token_budget
        prefills = [row for row in batch.rows if row.request.id not in decoding]
        decodes = len(ids) - len(prefills)
        assert set(ids[:decodes]) <= decoding, "decode rows come first"
        assert not decodes or set(ids[:decodes]) == decoding - set(batch.preempted), "all that can decode do"
        assert decodes or not limits.mixed_steps or not decoding, "mixed steps never leave decodes out"
        assert ids[:decodes] == sorted(ids[:decodes]) and ids[decodes:] == sorted(ids[decodes:])
        assert limits.max_prefill_rows is None or len(prefills) <= limits.max_prefill_rows
        assert limits.mixed_steps or not decodes or not prefills
        assert not set(batch.preempted) & set(ids)
        for row in batch.rows:
            assert 1 <= row.count <= min(row.request.remaining, limits.max_query or row.count)
            assert row.start == row.request.computed
            assert row.samples == (row.start + row.count == len(row.request.tokens))
        self.check_order()

    def check_order(self) -> None:
        running = [request.id for request in self.requests if request.status is Status.RUNNING]
        waiting = [request.id for request in self.requests if request.status is Status.WAITING]
        assert len(running) <= self.trace.limits.max_rows
        assert not running or not waiting or max(running) < min(waiting), "older requests run first"
        assert (self.scheduler.stats.running, self.scheduler.stats.waiting) == (len(running), len(waiting))

    def compute(self, batch: Batch) -> list[int]:
        """Run the step on the shadow device: copies, then all writes, then all reads."""
        for copy in batch.copies:
            for offset in range(self.trace.groups[copy.group].page_size):
                self.memory[copy.group, copy.dst, offset] = self.memory.get((copy.group, copy.src, offset), -1)
        for row in batch.rows:
            value = self.read(row.request, row.start - 1) if row.start else len(row.request.salt)
            for position in range(row.start, row.start + row.count):
                value = mix(value, row.request.tokens[position])
                for group in range(len(self.trace.groups)):
                    self.memory[self.place(row.request, group, position)] = value
        return [self.sample(row.request, row.start + row.count) for row in batch.rows if row.samples]

    def sample(self, request: Request, end: int) -> int:
        expected = len(request.salt)
        for position in range(end):
            expected = mix(expected, request.tokens[position])
            assert self.read(request, position) == expected, "a token attends to KV that is not its own"
        return next_token(self.read(request, end - 1))

    def read(self, request: Request, position: int) -> int:
        values = {self.memory[self.place(request, group, position)] for group in range(len(self.trace.groups))}
        assert len(values) == 1
        return values.pop()

    def place(self, request: Request, group: int, position: int) -> tuple[int, int, int]:
        size = self.trace.groups[group].page_size
        page = self.cache.pages(request.id, group)[position // size]
        assert page != 0
        return group, page, position % size

    def check_ends(self) -> None:
        assert sorted(self.returned) == list(range(len(self.requests))), "each request ends exactly once"
        for request in self.requests:
            output, reason = reference(request, self.limit)
            if request.finish_reason is FinishReason.CANCELLED:
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
)
arrivals = st.builds(Arrival, prompts, sampling, st.sampled_from([b"", b"", b"", b"salt"]))
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
)
group = st.builds(GroupSpec, pages=st.integers(4, 20), page_size=st.sampled_from([1, 2, 3, 4, 8]))
traces = st.builds(Trace, limits_strategy, st.lists(group, min_size=1, max_size=2), st.sampled_from([0.0, 0.2]), events)


@settings(derandomize=True, max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces)
def test_every_trace_keeps_every_promise(trace: Trace) -> None:
    note(repr(trace.limits))
    Driver(trace).play()


@settings(derandomize=True, max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(traces)
def test_the_same_trace_gives_the_same_batches(trace: Trace) -> None:
    first, second = Driver(trace), Driver(trace)
    first.play()
    second.play()
    assert first.log == second.log


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(arrivals, min_size=4, max_size=8), st.integers(5, 9), st.booleans())
def test_preempted_requests_give_the_output_of_an_undisturbed_run(
    requests: list[Arrival], pages: int, mixed: bool
) -> None:
    limits = Limits(token_budget=30, max_rows=8, max_model_len=200, mixed_steps=mixed)
    outputs = []
    for pool in (pages, 1000):
        prompts_that_fit = [Arrival(arrival.prompt[:8], arrival.params, arrival.salt) for arrival in requests]
        driver = Driver(Trace(limits, [GroupSpec(pool + 1, 6)], 0.0, list[Arrival | int | None](prompts_that_fit)))
        driver.play()
        outputs.append([request.output for request in driver.requests])
    assert outputs[0] == outputs[1]


def test_these_traces_do_preempt_and_do_hit_prefixes() -> None:
    """Guards the tests above against passing because nothing happens."""
    arrivals = [Arrival(SHARED[:7], SamplingParams(max_tokens=20, ignore_eos=True), b"") for _ in range(6)]
    limits = Limits(token_budget=30, max_rows=8, max_model_len=200)
    driver = Driver(Trace(limits, [GroupSpec(11, 4), GroupSpec(12, 3)], 0.0, list[Arrival | int | None](arrivals)))
    driver.play()
    assert driver.scheduler.stats.preemptions >= 5
    assert driver.cache.stats.hit_tokens > 0 and driver.cache.stats.evictions > 0
