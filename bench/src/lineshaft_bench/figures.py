"""From the moments at which tokens came to latencies and rates; the same for every engine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lineshaft_bench.stats import Percentiles
from lineshaft_bench.workloads import Job

FIGURES = {
    "ttft_ms": ("TTFT, ms", "less"),
    "tpot_ms": ("TPOT, ms", "less"),
    "itl_p50_ms": ("ITL p50, ms", "less"),
    "itl_p95_ms": ("ITL p95, ms", "less"),
    "itl_p99_ms": ("ITL p99, ms", "less"),
    "output_tokens_per_s": ("output tokens/s", "more"),
    "prompt_tokens_per_s": ("prompt tokens/s", "more"),
    "wall_s": ("whole round, s", "less"),
}
"""What a round gives: its label, and whether less or more is better."""


@dataclass(frozen=True)
class Ran:
    """One round as an engine ran it: for each job, the seconds after the round's begin at which its tokens came."""

    jobs: Sequence[Job]
    stamps: Sequence[Sequence[float]]

    @property
    def ttft(self) -> list[float]:
        """Seconds from each arrival to the first token."""
        return [times[0] - job.at for job, times in zip(self.jobs, self.stamps, strict=True)]

    @property
    def itl(self) -> list[float]:
        """Seconds between two tokens of a request, over all requests."""
        return [later - sooner for times in self.stamps for sooner, later in pairwise(times)]

    @property
    def tpot(self) -> list[float]:
        """Mean seconds of each further token, of each request that has one."""
        return [(times[-1] - times[0]) / (len(times) - 1) for times in self.stamps if len(times) > 1]

    def figures(self) -> dict[str, float]:
        """FIGURES of the round; latencies are medians over requests. What it cannot give is left out."""
        wall = max(times[-1] for times in self.stamps)
        prefilled = max(times[0] for times in self.stamps)
        itl = Percentiles.of(self.itl)
        found = {
            "ttft_ms": 1e3 * statistics.median(self.ttft),
            "output_tokens_per_s": sum(map(len, self.stamps)) / wall,
            "prompt_tokens_per_s": sum(len(job.prompt) for job in self.jobs) / prefilled,
            "wall_s": wall,
        }
        if self.itl:
            found |= {"tpot_ms": 1e3 * statistics.median(self.tpot), "itl_p50_ms": 1e3 * itl.p50}
            found |= {"itl_p95_ms": 1e3 * itl.p95, "itl_p99_ms": 1e3 * itl.p99}
        return found
