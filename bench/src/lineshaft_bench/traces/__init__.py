"""Traces of requests: when each comes, how long prompt and output are, and which prompts begin alike."""

from __future__ import annotations

from lineshaft_bench.traces.arrivals import Arrival, Trace
from lineshaft_bench.traces.generate import KINDS
from lineshaft_bench.traces.read import read_trace

__all__ = ["KINDS", "Arrival", "Trace", "read_trace"]
