"""`lineshaft bench`: measures the engine beside its bounds and its peers. Only parses and prints."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lineshaft.cli.options import add_config_arguments, check_writable, load_config, pairs
from lineshaft.cli.table import table
from lineshaft.errors import InvalidValue
from lineshaft_bench.cli.simulate import check_plot, names, whole

if TYPE_CHECKING:
    from lineshaft.config import EngineConfig
    from lineshaft_bench.measure import Comparison

HELP = "measure latency, throughput and memory, beside the machine's bounds and other engines"
OVERHEAD = "overhead"
WORKLOADS = ("single", "offline", "prefill", "shared", OVERHEAD)
DTYPE = "bfloat16"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--workload", metavar="A,B", default="single,offline,prefill,shared", help=f"of {', '.join(WORKLOADS)}")
    add("--rounds", metavar="N", type=whole, help="timed rounds (default: 5 of single, 3 of the others)")
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
    asked = workloads(args)
    if args.plot:
        check_plot(args.plot)
    if args.trace:
        check_writable(args.trace, "--trace")
    if OVERHEAD in asked:
        if len(asked) > 1:
            raise InvalidValue(f"--workload {OVERHEAD} runs no model: measure it alone")
        return run_overhead(args)
    found = compare(args)
    from lineshaft_bench.plots import draw
    from lineshaft_bench.report import panels, shown

    if args.json:
        print(json.dumps([comparison.to_json() for comparison in found], indent=2))
    else:
        print("\n\n".join(map(shown, found)))
    if args.plot:
        draw(panels(found), "lineshaft bench", args.plot)
    return 0


def workloads(args: Namespace) -> list[str]:
    """Those that `--workload` names. Raises InvalidValue for an unknown one."""
    asked = names(args.workload)
    for name in asked:
        if name not in WORKLOADS:
            raise InvalidValue(f"--workload {name}: known are {', '.join(WORKLOADS)}")
    return asked


def compare(args: Namespace) -> list[Comparison]:
    """Measure the workloads as the options say; progress goes to stderr."""
    from lineshaft_bench.measure import Bench
    from lineshaft_bench.peers.client import environments, of_peers

    peers = names(args.against) if args.against else []
    with tempfile.TemporaryDirectory(prefix="lineshaft-bench-") as scratch:
        bench = Bench(
            configured(args), peers, environments(dict(pairs("--peer-env", args.peer_env))),
            of_peers("--peer-model", dict(pairs("--peer-model", args.peer_model))), Path(scratch), args.rounds,
            str(args.trace.resolve()) if args.trace else "",
        )  # fmt: skip
        return bench.run(workloads(args), lambda line: print(line, file=sys.stderr))


def configured(args: Namespace) -> EngineConfig:
    """As the options say; where they leave it open, bfloat16, as all peers have it."""
    config = load_config(args)
    return config.model_copy(update={"dtype": DTYPE}) if config.dtype == "auto" else config


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
