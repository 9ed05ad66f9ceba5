"""Paired ratios of times: the only way in which conformance may time anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps

from lineshaft_conformance.checks import Failure, Found
from lineshaft_conformance.subject import Subject

RUNS = 9
TRIES = 3
TOO_MUCH = 3.0
"""A ratio from which on a rule counts as broken: far above the noise of the minimum of interleaved runs, far below the
8 that a cost in proportion to the size shows."""


def paired_ratio(small: Callable[[], object], large: Callable[[], object], runs: int = RUNS) -> float:
    """How many times longer `large` takes than `small`: one run of each that does not count, then interleaved runs,
    the minimum of each."""
    small()
    large()
    pairs = [(seconds(small), seconds(large)) for _ in range(runs)]
    return min(pair[1] for pair in pairs) / min(pair[0] for pair in pairs)


def patient(run: Callable[[Subject, int], Found]) -> Callable[[Subject, int], Found]:
    """A timed check that fails only if it does so in each of TRIES: during one of them another program may have had the
    processor, and what breaks a rule of speed breaks it every time."""

    @wraps(run)
    def tried(subject: Subject, seed: int) -> Found:
        for _ in range(TRIES - 1):
            try:
                return run(subject, seed)
            except Failure:
                continue
        return run(subject, seed)

    return tried


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
