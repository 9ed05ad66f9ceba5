"""Runs a generation on the real engine and keeps every step's message."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.executors import Executor, Forwarding, make_executor
from lineshaft.registry import Registry
from lineshaft.runner.messages import StepMessage, StepResult
from lineshaft.runner.setup import degrees_of
from lineshaft.runner.worker import Progress
from lineshaft.sampling.params import SamplingParams
from lineshaft_conformance.trace.errors import TraceError
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import StepShape


class Keeping(Forwarding):
    """An executor that keeps what it was told and the token ids that came out."""

    def __init__(self, inner: Executor) -> None:
        super().__init__(inner)
        self.beside = False
        self.steps: list[StepMessage] = []
        self.token_ids: list[HostArray] = []

    def submit(self, steps: Sequence[StepMessage]) -> None:
        self.steps += steps
        self.inner.submit(steps)

    def collect(self) -> list[StepResult]:
        results = self.inner.collect()
        self.token_ids += [result.token_ids for result in results]
        return results


def generate(
    config: EngineConfig,
    registry: Registry,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    eos_ids: frozenset[int],
    progress: Progress,
) -> Keeping:
    """A greedy generation for prompts of token ids.

    Raises TraceError for more than one worker, RequestError, and what `Engine` raises.
    """
    degrees = degrees_of(config)
    if math.prod(degree for _, degree in degrees.axes) != 1:
        raise TraceError(f"layout {degrees}: a trace is of one worker; set every degree to 1")
    kept = Keeping(make_executor(config, registry))
    with Engine(config, registry=registry, progress=progress, executor=kept) as engine:
        for prompt in prompts:
            engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens), eos_ids)
        most, done = len(prompts) * max_tokens, 0
        while engine.has_work:
            progress("generating", done, most)
            done += len(engine.step())
    return kept


def pages_used(steps: Sequence[StepMessage]) -> tuple[int, ...]:
    """The pages, with the null page, that the steps speak of in each cache group."""
    used = [1] * len(steps[0].shape.pages)
    for step in steps:
        for group in range(len(used)):
            copies = step.copies[step.copies[:, 0] == group, 1:]
            used[group] = 1 + int(
                max(used[group] - 1, step.forward[f"page_table.{group}"].max(), copies.max(initial=0))
            )
    return tuple(used)


def shapes_of(steps: Sequence[StepMessage]) -> list[StepShape]:
    """The distinct buckets, largest first."""
    return sorted({step.shape for step in steps}, key=lambda shape: -shape.tokens)
