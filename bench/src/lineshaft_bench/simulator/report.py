"""A simulated run as figures, and several of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lineshaft_bench.simulator.loop import Outcome
from lineshaft_bench.stats import Percentiles


@dataclass(frozen=True)
class Summary:
    """The figures of one run. Latencies in seconds, rates per simulated second, shares from 0 to 1."""

    ttft: Percentiles
    itl: Percentiles
    queue: Percentiles
    total: Percentiles
    requests: int
    refused: int
    rejected: int
    expired: int
    seconds: float
    busy_share: float
    steps: int
    rows_per_step: float
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    preemptions: int
    swaps: int
    hit_rate: float  # prompt tokens found in the prefix cache
    evictions: int  # pages
    kv_mean: float  # share of the pages held, over the time in steps
    kv_most: float
    most_running: int

    @classmethod
    def of(cls, run: Outcome) -> Summary:
        """Sum up a run."""
        seconds, steps = run.seconds or 1.0, run.steps or 1
        return cls(
            ttft=Percentiles.of(run.ttft), itl=Percentiles.of(run.itl), queue=Percentiles.of(run.queue),
            total=Percentiles.of(run.total), requests=len(run.total), refused=run.refused, rejected=run.rejected,
            expired=run.expired, swaps=run.swaps, seconds=run.seconds, busy_share=run.busy / seconds, steps=run.steps,
            rows_per_step=run.rows / steps, requests_per_s=len(run.total) / seconds,
            output_tokens_per_s=run.output_tokens / seconds, prompt_tokens_per_s=run.prompt_tokens / seconds,
            preemptions=run.preemptions, hit_rate=run.hit_tokens / (run.queried_tokens or 1), evictions=run.evictions,
            kv_mean=run.page_seconds / (run.busy or 1.0), kv_most=run.most_pages, most_running=run.most_running,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


LATENCIES = {"TTFT": "ttft", "ITL": "itl", "queue time": "queue", "whole request": "total"}
SHOWN = ("p50", "p90", "p95", "p99")


def rows(summaries: Mapping[str, Summary]) -> list[Sequence[str]]:
    """A line for each figure, with a column for each run."""
    runs = list(summaries.values())
    lines: list[Sequence[str]] = []
    for label, name in LATENCIES.items():
        for percentile in SHOWN:
            values = (1e3 * getattr(getattr(run, name), percentile) for run in runs)
            lines.append((f"{label} {percentile}, ms", *(f"{value:.2f}" for value in values)))
    plain = {
        "output tokens/s": "{output_tokens_per_s:.1f}", "prompt tokens/s": "{prompt_tokens_per_s:.1f}",
        "requests/s": "{requests_per_s:.3f}", "requests finished": "{requests}", "refused: too long": "{refused}",
        "ended for want of pages": "{rejected}", "ended by their deadline": "{expired}",
        "preemptions": "{preemptions}", "of which swapped": "{swaps}", "prefix hit rate": "{hit_rate:.1%}",
        "pages evicted": "{evictions}", "KV pages held, mean": "{kv_mean:.1%}", "KV pages held, most": "{kv_most:.1%}",
        "rows a step": "{rows_per_step:.1f}", "rows, most": "{most_running}", "steps": "{steps}",
        "busy": "{busy_share:.1%}", "simulated s": "{seconds:.1f}",
    }  # fmt: skip
    return [*lines, *((label, *(form.format_map(vars(run)) for run in runs)) for label, form in plain.items())]
