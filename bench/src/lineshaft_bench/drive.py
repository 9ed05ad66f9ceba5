"""Gives an engine its requests when they are due, and notes when their tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lineshaft.engine import Engine
from lineshaft.flight import Token
from lineshaft.meter import now
from lineshaft.sampling.params import SamplingParams
from lineshaft_bench.workloads import Job


def drive(engine: Engine, jobs: Sequence[Job], step: Callable[[], Sequence[Token]] | None = None) -> list[list[float]]:
    """Run the jobs to the end, greedily: for each, the seconds after the call at which its tokens came.

    `step` takes the place of `engine.step`. A job that is due while a step runs is added after it, as a server does.
    """
    stamps: list[list[float]] = [[] for _ in jobs]
    waiting, numbers = sorted(range(len(jobs)), key=lambda n: (-jobs[n].at, -n)), dict[int, int]()
    step = step or engine.step
    began = now()
    while waiting or engine.has_work:
        while waiting and jobs[waiting[-1]].at <= now() - began:
            number = waiting.pop()
            params = SamplingParams(temperature=0.0, max_tokens=jobs[number].out, ignore_eos=True)
            numbers[engine.add(jobs[number].prompt, params).id] = number
        if not engine.has_work:
            time.sleep(max(0.0, jobs[waiting[-1]].at - (now() - began)))
            continue
        tokens = step()
        at = now() - began
        for token in tokens:
            stamps[numbers[token.request.id]].append(at)
    return stamps
