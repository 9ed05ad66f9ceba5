"""Counts and times of an engine's steps and requests. Reads the clock; decides nothing."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field

from lineshaft.outputs import RequestMetrics

KEPT = 4096
"""Medians are over this many of the latest values."""


def now() -> float:
    """Seconds on a clock that never goes back."""
    return time.perf_counter()


def recent() -> deque[float]:
    """A bounded window of values."""
    return deque(maxlen=KEPT)


def median(values: deque[float]) -> float:
    """The median, 0 if there is no value."""
    return statistics.median(values) if values else 0.0


@dataclass
class Clock:
    """The moments of one request, in seconds; 0 until they come."""

    arrived: float = field(default_factory=now)
    scheduled: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    def token(self, at: float) -> None:
        """Book one token."""
        self.first = self.first or at
        self.last, self.tokens = at, self.tokens + 1

    def metrics(self, cached: int, preemptions: int) -> RequestMetrics:
        """The request's metrics, once it is finished."""
        further = max(self.tokens - 1, 1)
        return RequestMetrics(
            ttft_s=max(self.first - self.arrived, 0.0),
            tpot_s=(self.last - self.first) / further,
            queue_s=max(self.scheduled - self.arrived, 0.0),
            total_s=max(self.last - self.arrived, 0.0),
            cached_tokens=cached,
            preemptions=preemptions,
        )


@dataclass
class Meter:
    """Running totals over an engine's life."""

    steps: int = 0
    seconds: float = 0.0
    kernel_seconds: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    pages_used: int = 0
    ttft: deque[float] = field(default_factory=recent)
    tpot: deque[float] = field(default_factory=recent)
    host: deque[float] = field(default_factory=recent)  # of decode steps of one row
    kernels: deque[float] = field(default_factory=recent)

    def step(self, wall: float, kernels: float, single_decode: bool, sampled: int, pages: int) -> None:
        """Book one step: its wall time and the kernels' share of it, in seconds."""
        self.steps += 1
        self.seconds += wall
        self.kernel_seconds += kernels
        self.output_tokens += sampled
        self.pages_used = max(self.pages_used, pages)
        if single_decode:
            self.host.append(max(0.0, wall - kernels))
            self.kernels.append(kernels)

    def request(self, metrics: RequestMetrics, prompt_tokens: int) -> None:
        """Book one finished request."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        if metrics.ttft_s:  # 0 where the request ended without a token
            self.ttft.append(metrics.ttft_s)
        if metrics.tpot_s:
            self.tpot.append(metrics.tpot_s)
