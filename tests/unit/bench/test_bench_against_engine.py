"""The simulation does what the engine does: on a clock that only steps move, tokens come at the same moments."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lineshaft.config import make_config
from lineshaft.engine import Engine
from lineshaft.registry import discover
from lineshaft.runner.messages import StepMessage, StepResult
from lineshaft_bench import drive as driving
from lineshaft_bench.figures import Ran
from lineshaft_bench.measure import simulated
from lineshaft_bench.overhead import VOCAB, AtOnce
from lineshaft_bench.simulator.cost import Linear
from lineshaft_bench.simulator.fit import load_in
from lineshaft_bench.simulator.setup import Setting
from lineshaft_bench.traces import read_trace
from lineshaft_bench.workloads import Job

COST = Linear(0.011, row_s=0.0013, token_s=0.0007, context_s=1e-6)
ROWS = 8


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Timed(AtOnce):
    """An executor whose steps take the modelled time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(ROWS)
        self._clock, self._steps = clock, list[StepMessage]()

    def submit(self, steps: Sequence[StepMessage]) -> None:
        super().submit(steps)
        self._steps += steps

    def collect(self) -> list[StepResult]:
        self._clock.seconds += COST.seconds(load_in(self._steps.pop(0)))
        return super().collect()


def jobs_of(trace: str) -> list[Job]:
    """What is shared stays shared: the ids of a segment are its number."""
    return [
        Job([id % VOCAB for id in arrival.token_ids()], arrival.output_tokens, arrival.at)
        for arrival in read_trace(trace, seed=3).arrivals
    ]


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize(
    ("trace", "pages"),
    [
        ("poisson:rate=20,requests=60,prompt=lognormal(90,0.8),output=uniform(1,40)", 1025),
        ("bursty:rate=30,requests=80,prompt=lognormal(60,1),output=uniform(1,30),prefix=64,prefixes=3", 1025),
        ("constant:rate=40,requests=40,prompt=120,output=60", 140),
    ],
)
def test_every_token_comes_when_the_engine_gives_it(
    trace: str, pages: int, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, jobs = Clock(), jobs_of(trace)
    monkeypatch.setattr(driving, "now", clock.now)
    monkeypatch.setattr(driving.time, "sleep", clock.sleep)
    executor = Timed(clock)
    (sizes,) = executor.size()
    monkeypatch.setattr(executor, "size", lambda: [type(sizes)(**{**vars(sizes), "pages": (pages,)})])
    config = make_config(model="none", max_logprobs=0, overlap=overlap, scheduler={"max_rows": ROWS})
    with Engine(config, registry=discover([]), executor=executor) as engine:
        real = Ran(jobs, driving.drive(engine, jobs))
    setting = Setting(sizes.limits, (pages,), sizes.page_sizes[0], overlap=overlap == "on")
    made = simulated(jobs, setting, COST)
    for given, predicted in zip(real.stamps, made.stamps, strict=True):
        assert given == pytest.approx(predicted, abs=1e-9)
