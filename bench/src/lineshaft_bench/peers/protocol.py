"""The end of the pipe inside an engine's environment: reads a request a line, calls the driver, answers a line.

Standard library only, and importable as a plain file beside the drivers: the environment holds no lineshaft.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Driver(Protocol):
    """What a driver file offers."""

    def load(self, model: str, dtype: str, threads: int, rows: int, longest: int, **options: Any) -> dict[str, Any]:
        """Load the model for `rows` requests at once of at most `longest` tokens; say `version` and `precision`."""
        ...

    def run(self, jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Run {"prompt": ids, "out": count} to the end, greedily, past any end-of-sequence token.

        Answers `stamps`: for each job, the seconds after the call at which each token came.
        """
        ...


def serve(driver: Driver) -> None:
    """Answer {"do": NAME, ...} with what the driver's method of that name returns, until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            answer = memory() if name == "memory" else getattr(driver, name)(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    sys.stdout.flush()
    os._exit(0)  # engines leave threads and processes that would not end


def memory() -> dict[str, int]:
    """Most bytes that this process and its largest ended child held."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": 1024 * (own + sum(map(peak_of, children())))}


def children() -> list[int]:
    """All processes below this one, on Linux."""
    found, look = [], [os.getpid()]
    while look:
        pid = look.pop()
        try:
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                below = [int(text) for text in file.read().split()]
        except OSError:
            below = []
        found += below
        look += below
    return found


def peak_of(pid: int) -> int:
    """Most KiB that a process held."""
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        return int(lines.get("VmHWM", "0 kB").split()[0])
    except OSError:
        return 0


def steps(jobs: Sequence[dict[str, Any]], step: Callable[[], Sequence[tuple[int, int]]]) -> list[list[float]]:
    """Call `step`, which returns (job, new tokens) pairs, until every job has its tokens; when each token came."""
    began = time.perf_counter()
    stamps: list[list[float]] = [[] for _ in jobs]
    missing = sum(job["out"] for job in jobs)
    while missing > 0:
        for job, count in step():
            stamps[job] += [time.perf_counter() - began] * count
            missing -= count
    return stamps
