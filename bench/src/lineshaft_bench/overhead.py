"""What a step costs the engine apart from its kernels: the real engine over an executor that answers at once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lineshaft.config import make_config
from lineshaft.engine import Engine
from lineshaft.meter import now
from lineshaft.plan import Plan
from lineshaft.registry import discover
from lineshaft.runner.buckets import make_shapes
from lineshaft.runner.messages import ChoiceMessage, Sizes, Started, StepMessage, StepResult
from lineshaft.runner.worker import Progress
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Limits
from lineshaft_bench.timeline import Recorder
from lineshaft_contract.backends import Capabilities

PAGE, LONGEST, VOCAB, PROMPT = 16, 2048, 32000, 100
STEPS = 300


class AtOnce:
    """An executor that computes nothing: every row gets token 1."""

    beside = False

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._step: StepMessage | None = None

    def size(self) -> list[Sizes]:
        per_row = -(-LONGEST // PAGE)
        limits = Limits(max(512, self._rows), self._rows, LONGEST)
        shapes = make_shapes(Capabilities(), limits, (per_row,))
        plan = Plan("none", shapes, (), {}, "", 0, 0)
        return [Sizes(plan, (1,), (1 + per_row * self._rows,), (PAGE,), limits, shapes, VOCAB, windows=(0,))]

    def start(self, pages: tuple[int, ...], progress: Progress) -> list[Started]:
        return [Started(0.0, 0.0, 0)]

    def submit(self, steps: Sequence[StepMessage]) -> None:
        (self._step,) = steps

    def choose(self, choices: Sequence[ChoiceMessage]) -> None:
        """Nothing to choose."""

    def collect(self) -> list[StepResult]:
        assert self._step is not None
        return [StepResult(np.ones(self._step.shape.logits, np.int32), 0.0)]

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of one decode step with so many rows, and of its phases; medians and means."""

    rows: int
    step_ms: float
    phases_ms: dict[str, float]


def overhead(rows: int, overlap: str = "off") -> Overhead:
    """Measure decode steps of so many rows, greedy; `overlap` as in the configuration."""
    limits = {"max_rows": rows, "token_budget": max(512, rows)}
    config = make_config(model="none", max_logprobs=0, overlap=overlap, scheduler=limits)
    with Engine(config, registry=discover([]), executor=AtOnce(rows)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=LONGEST - PROMPT, ignore_eos=True)
        for row in range(rows):
            engine.add([(row * PROMPT + n) % VOCAB for n in range(PROMPT)], params)
        while any(not live.request.output for live in engine.requests()):
            engine.step()
        engine.recorder = recorder = Recorder()
        times = []
        for _ in range(STEPS):
            began = now()
            engine.step()
            times.append(now() - began)
    phases = {name: 1e3 * seconds / STEPS for name, seconds in recorder.seconds().items()}
    return Overhead(rows, 1e3 * statistics.median(times), phases)
