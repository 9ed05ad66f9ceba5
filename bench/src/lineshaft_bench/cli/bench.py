"""`lineshaft bench`: measures the engine beside its bounds and its peers. Only parses and prints."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lineshaft.cli.options import add_config_arguments, check_writable, load_config, pairs
from lineshaft.cli.table import table
from lineshaft.errors import InvalidValue
from lineshaft_bench.cli.simulate import check_plot, names, whole

if TYPE_CHECKING:
    from lineshaft.config import EngineConfig
    from lineshaft_bench.measure import Comparison, Measured
    from lineshaft_bench.stats import Spread

HELP = "measure latency, throughput and memory, beside the machine's bounds and other engines"
OVERHEAD = "overhead"
WORKLOADS = ("single", "offline", "prefill", "shared", OVERHEAD)
DTYPE = "bfloat16"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--workload", metavar="A,B", default="single,offline,prefill,shared", help=f"of {', '.join(WORKLOADS)}")
    add("--repeat", metavar="N", type=whole, default=1, help="N times as many rounds")
    add("--against", metavar="A,B", default="", help="peers: vllm, openvino, transformers, llamacpp")
    add(
        "--peer-env",
        metavar="PEER=FOLDER",
        action="append",
        default=[],
        help="a peer's virtual environment; repeatable",
    )
    add("--peer-model", metavar="PEER=PATH", action="append", default=[], help="a peer's model, where it is not ours")
    add("--rows", metavar="N,N", type=counts, default=(64, 256), help="sequences of the workload overhead")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--plot", metavar="FILE", type=Path, help="draw the engines into a .png or .svg file")
    add("--trace", metavar="FILE", type=Path, help="write the phases of all steps as a timeline for Perfetto")
    add_config_arguments(parser)


def counts(text: str) -> list[int]:
    """The whole numbers of N,N."""
    return [whole(part) for part in names(text)]


def run(args: Namespace) -> int:
    asked = names(args.workload)
    for name in asked:
        if name not in WORKLOADS:
            raise InvalidValue(f"--workload {name}: known are {', '.join(WORKLOADS)}")
    if args.plot:
        check_plot(args.plot)
    if args.trace:
        check_writable(args.trace, "--trace")
    if OVERHEAD in asked:
        if len(asked) > 1:
            raise InvalidValue(f"--workload {OVERHEAD} runs no model: measure it alone")
        return run_overhead(args)
    from lineshaft_bench.measure import Bench
    from lineshaft_bench.peers.client import environments, of_peers

    peers = names(args.against) if args.against else []
    with tempfile.TemporaryDirectory(prefix="lineshaft-bench-") as scratch:
        bench = Bench(
            configured(args), peers, environments(dict(pairs("--peer-env", args.peer_env))),
            of_peers("--peer-model", dict(pairs("--peer-model", args.peer_model))), Path(scratch), args.repeat,
            str(args.trace.resolve()) if args.trace else "",
        )  # fmt: skip
        found = bench.run(asked, lambda line: print(line, file=sys.stderr))
    if args.json:
        print(json.dumps([comparison.to_json() for comparison in found], indent=2))
    else:
        print("\n\n".join(map(shown, found)))
    if args.plot:
        plot(found, args.plot)
    return 0


def configured(args: Namespace) -> EngineConfig:
    """As the options say; where they leave it open, bfloat16, as all peers have it."""
    config = load_config(args)
    return config.model_copy(update={"dtype": DTYPE}) if config.dtype == "auto" else config


# ---- the table -------------------------------------------------------------------------------------------------------


def shown(found: Comparison) -> str:
    """A line for each figure: ours, the bound, and each peer, with ratios of ours to theirs."""
    from lineshaft_bench.figures import FIGURES
    from lineshaft_bench.measure import BOUND
    from lineshaft_bench.peers.client import OURS

    others = [name for name in found.engines if name != OURS]
    header = (found.workload, OURS, BOUND, "ratio", *(word for name in others for word in (name, "ratio")))
    ours = found.engines[OURS].figures
    lines: list[Sequence[str]] = []
    for key, (label, _) in FIGURES.items():
        if key in ours:
            line = [label, spread(ours[key]), number(found.bound.get(key)), number(found.ratio(key, BOUND))]
            for name in others:
                theirs = found.engines[name].figures.get(key)
                line += [spread(theirs) if theirs else "-", number(found.ratio(key, name))]
            lines.append(line)
    lines += [memory(found, others), per_gigabyte(found, others)]
    return "\n".join((table(header, lines), *notes(found)))


def spread(value: Spread) -> str:
    """The median, with the smallest and largest of several rounds."""
    return f"{number(value.median)} [{number(value.low)}, {number(value.high)}]"


def number(value: float | None) -> str:
    """Three significant digits or more."""
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def memory(found: Comparison, others: Sequence[str]) -> list[str]:
    mine, *theirs = (engine.peak_bytes / 1e9 for engine in ordered(found, others))
    return ["memory, GB", number(mine), "-", "-", *(word for gb in theirs for word in (number(gb), number(mine / gb)))]


def per_gigabyte(found: Comparison, others: Sequence[str]) -> list[str]:
    mine, *theirs = (engine.figures["output_tokens_per_s_gb"].median for engine in ordered(found, others))
    return ["tokens/s a GB", number(mine), "-", "-", *(word for r in theirs for word in (number(r), number(mine / r)))]


def ordered(found: Comparison, others: Sequence[str]) -> list[Measured]:
    """Ours first, as in the header."""
    from lineshaft_bench.peers.client import OURS

    return [found.engines[name] for name in (OURS, *others)]


def notes(found: Comparison) -> list[str]:
    """What the engines are, the measured bounds, and what ours says of its steps."""
    from lineshaft_bench.peers.client import OURS

    bounds, facts = found.bounds, found.engines[OURS].facts
    versions = "; ".join(f"{name}: {engine.loaded['version']}, {engine.loaded['precision']}"
                         for name, engine in found.engines.items())  # fmt: skip
    return [
        f"KV pages held: most {facts['kv_most']:.1%}, mean {facts['kv_mean']:.1%}; host "
        f"{facts['host_ms_per_step']:.2f} ms and kernels {facts['kernel_ms_per_step']:.2f} ms a step (medians); "
        f"{facts['preemptions']} preemptions",
        f"bounds of {bounds.threads} threads: reads {bounds.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"{bounds.dtype} products {bounds.flops_per_s / 1e12:.3f} TFLOP/s ({bounds.library})",
        versions,
    ]


def plot(found: Sequence[Comparison], file: Path) -> None:
    from lineshaft_bench.plots import Bars, Curves, draw

    panels: list[Bars | Curves] = []
    for one in found:
        itl = {name: [value for ran in engine.ran for value in ran.itl] for name, engine in one.engines.items()}
        ttft = {name: [value for ran in engine.ran for value in ran.ttft] for name, engine in one.engines.items()}
        rates = {
            name: {label: engine.figures[f"{label}_tokens_per_s"].median for label in ("output", "prompt")}
            for name, engine in one.engines.items()
        }
        bound = {label: one.bound[f"{label}_tokens_per_s"] for label in ("output", "prompt")}
        panels += [
            Curves(f"{one.workload}: inter-token latency" if any(itl.values()) else f"{one.workload}: TTFT", "seconds",
                   itl if any(itl.values()) else ttft),
            Bars(f"{one.workload}: throughput", "tokens per second", {**rates, "bound": bound}),
        ]  # fmt: skip
    draw(panels, "lineshaft bench", file)


# ---- the workload `overhead` -----------------------------------------------------------------------------------------


def run_overhead(args: Namespace) -> int:
    from lineshaft_bench.overhead import overhead

    found = [overhead(rows) for rows in args.rows]
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    phases = list(dict.fromkeys(phase for one in found for phase in one.phases_ms))
    lines = [
        (str(one.rows), f"{one.step_ms:.3f}", *(f"{one.phases_ms.get(phase, 0.0):.3f}" for phase in phases))
        for one in found
    ]
    print(table(("ROWS", "STEP MS", *(f"{phase.upper()} MS" for phase in phases)), lines))
    return 0
