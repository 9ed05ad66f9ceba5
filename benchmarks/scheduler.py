"""What the scheduler costs the host: microseconds of one `schedule` and one `commit` of a decode step.

    python benchmarks/scheduler.py --rows 1 64 256

Two columns: batches that are committed at once, and batches that are scheduled one step ahead. Each figure is the best
of several medians, since other work on the machine can only add to it.
"""

from __future__ import annotations

import argparse
import statistics
import time

from lineshaft.cache import CacheManager, GroupSpec
from lineshaft.sampling import SamplingParams
from lineshaft.scheduler import Batch, Limits, Request, Scheduler

PROMPT, STEPS, ROUNDS = 100, 300, 5


def prefilled(rows: int) -> Scheduler:
    """A scheduler of `rows` requests that are past their prompts."""
    scheduler = Scheduler(Limits(4096, rows, 1024), CacheManager([GroupSpec(1 + 64 * rows, 16)]))
    params = SamplingParams(temperature=0.0, max_tokens=800, ignore_eos=True)
    for i in range(rows):
        scheduler.add(Request(i, tuple(range(PROMPT)), params))
    while not scheduler.running or any(not request.output for request in scheduler.running):
        commit(scheduler, scheduler.schedule())
    return scheduler


def commit(scheduler: Scheduler, batch: Batch) -> None:
    scheduler.commit(batch, [1] * batch.samples)


def step_us(rows: int, ahead: bool) -> float:
    """Median microseconds of one schedule and commit."""
    scheduler = prefilled(rows)
    pending = scheduler.schedule() if ahead else None
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        batch = scheduler.schedule()
        commit(scheduler, pending or batch)
        times.append(time.perf_counter() - began)
        pending = batch if ahead else None
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    args = parser.parse_args()
    print(f"{'rows':>5} {'us a step':>10} {'one ahead':>10} {'us a row':>9}")
    for rows in args.rows:
        at_once, ahead = (min(step_us(rows, ahead) for _ in range(ROUNDS)) for ahead in (False, True))
        print(f"{rows:5} {at_once:10.1f} {ahead:10.1f} {ahead / rows:9.2f}")


if __name__ == "__main__":
    main()
