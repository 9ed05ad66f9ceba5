"""What a start costs a backend that compiles its programs: the first, and one that finds them compiled.

    python benchmarks/start.py --backend tpu --backend-option platform=cpu

Each start is a process of its own; the first has an empty folder of compiled programs (the option `cache_dir`). The
ratio is of the seconds that the programs took ("capture"); loading weights is the same for both and told beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

COMMAND = [sys.executable, "-c", "import sys; from lineshaft.cli.main import main; sys.exit(main())", "generate"]


def start(options: list[str], folder: str) -> dict[str, Any]:
    """The metrics of a run of two tokens."""
    command = [*COMMAND, *options, "--backend-option", f"cache_dir={folder}", "--prompt", "One", "--max-tokens", "2"]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["run"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/demo.toml")
    parser.add_argument("--rounds", type=int, default=3, help="warm starts")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [start(["--config", args.config, *more], folder) for _ in range(1 + args.rounds)]
    cold, *warm = [run["capture_s"] for run in runs]
    print(f"cold: programs {cold:.2f} s, weights {runs[0]['load_s']:.2f} s")
    listed = ", ".join(f"{seconds:.2f}" for seconds in warm)
    print(f"warm: programs {listed} s; cold over the slowest: {cold / max(warm):.1f}")


if __name__ == "__main__":
    main()
