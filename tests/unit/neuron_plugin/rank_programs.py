"""What ranks of the tests of collectives run, each in a process of its own: `python -m ... FOLDER SCENARIO:RANKS ...`.

All ranks are forked from one process, so that torch is imported once. Each leaves what it found, or its traceback, in
FOLDER/SCENARIO/RANK.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.unit.neuron_plugin.static_sessions import Planned, const, started

from lineshaft_contract.backends import World
from lineshaft_contract.errors import LineshaftError
from lineshaft_contract.steps import HostStep, InputField, InputLayout, StepShape
from lineshaft_neuron import stand_in
from lineshaft_neuron.collectives import SharedWorld
from lineshaft_torch.kernels import portable_kernels

AXES = ("dp", "pp", "cp", "ep", "tp")
KERNELS = {kernel.op: kernel for kernel in portable_kernels("neuron")}
INPUTS = InputLayout([InputField("x", "float32", (4,))])


def world(rank: int, folder: Path, **degrees: int) -> World:
    return World(rank, tuple((axis, degrees.get(axis, 1)) for axis in AXES), rendezvous=str(folder / "store"))


def gloo(timeout_s: float = 60.0) -> SharedWorld:
    return SharedWorld("gloo", own_dtype=False, timeout_s=timeout_s)


def program_of(session: Any, jobs: Any) -> Any:
    """One program of all the jobs, (op, problem, operands by rank, the other arguments); its outputs are numbered."""
    rank = session.world.rank
    session.load({str(n): const(str(n), operands[rank]) for n, (_, _, operands, _) in enumerate(jobs)}, None, {})

    def bind(made: Any) -> list[Callable[..., Any]]:
        return [KERNELS[op].bind(problem, made) for op, problem, _, _ in jobs]

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {str(n): ops[n](weights[str(n)], *rest) for n, (*_, rest) in enumerate(jobs)}, caches

    return session.capture(forward, StepShape(1, 1, (), 1, 1), INPUTS, Planned(bind))


def summing(session: Any) -> Any:
    """A program that sums x over tp."""

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"sum": ops.all_reduce(step.arrays["x"])}, caches

    return session.capture(forward, StepShape(1, 1, (), 1, 1), INPUTS, Planned(lambda made: made.groups.group("tp")))


def run(program: Any, value: float) -> float:
    host = HostStep(INPUTS)
    host["x"][:] = value
    return float(program(host).result("sum")[0])


def said(call: Callable[[], Any]) -> tuple[str, str]:
    """The error that a call raises: its type and its text."""
    try:
        call()
    except LineshaftError as error:
        return type(error).__name__, str(error)
    return "", "no error"


# ---- scenarios -------------------------------------------------------------------------------------------------------


def jobs(rank: int, folder: Path, degrees: dict[str, int]) -> Any:
    """(results, digest, collectives) of all the jobs in one program."""
    session = started(world=world(rank, folder, **degrees), shared=gloo())
    listed = pickle.loads((folder / "jobs").read_bytes())
    program = program_of(session, listed)
    made = program(HostStep(INPUTS))
    results = [made.result(str(n)) for n in range(len(listed))]
    session.close()
    session.close()
    return results, program.digest, program.report.collectives


def again(rank: int, folder: Path) -> Any:
    """Sessions one after another, and two at once, as of two backends, of which the first goes: sums, whether torch's
    world is open, and what a session of another world is told meanwhile."""
    shared, found = gloo(), []
    place = world(rank, folder, tp=2)
    for turn in range(2):
        session = started(world=place, shared=shared)
        found.append(run(summing(session), rank + 10.0 * turn))
        session.close()
        found.append(torch.distributed.is_initialized())
    one, other = (started(world=place, shared=gloo()) for _ in range(2))
    programs = [summing(one), summing(other)]
    found += [run(program, rank + 100.0) for program in programs]
    stranger = started(world=world(rank, folder, tp=4), shared=gloo())
    found += said(lambda: stranger.groups.group("tp"))
    stranger.close()
    one.close()
    found += [run(programs[1], rank + 200.0), torch.distributed.is_initialized()]
    other.close()
    return [*found, torch.distributed.is_initialized()]


def lost(rank: int, folder: Path) -> Any:
    """Rank 1 ends after the first step: what rank 0 is told at the next step, after it, and at another capture."""
    shared = gloo()
    session, other = (started(world=world(rank, folder, tp=2), shared=shared) for _ in range(2))
    program = summing(session)
    other.groups.group("tp")
    assert run(program, 1.0) == 2.0
    if rank == 1:
        os._exit(0)
    found = [said(lambda: run(program, 1.0)), said(lambda: run(program, 1.0)), said(lambda: summing(other))]
    session.close()
    other.close()
    return found


def stuck(rank: int, folder: Path) -> Any:
    """Rank 1 lives on and answers nothing: what rank 0 is told."""
    session = started(world=world(rank, folder, tp=2), shared=gloo(8.0))
    program = summing(session)
    if rank == 1:
        signal.pause()
    return said(lambda: run(program, 1.0))


SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    "pair": lambda rank, folder: jobs(rank, folder, {"tp": 2}),
    "mesh": lambda rank, folder: jobs(rank, folder, {"dp": 2, "tp": 2}),
    "again": again, "lost": lost, "stuck": stuck,
}  # fmt: skip


def main(folder: Path, scenarios: list[str]) -> None:
    """Fork every rank of every scenario, and wait for all but those that never end by themselves."""
    stand_in.start()
    children: dict[int, str] = {}
    for scenario in scenarios:
        name, ranks = scenario.split(":")
        (folder / name).mkdir(exist_ok=True)
        for rank in range(int(ranks)):
            pid = os.fork()
            if not pid:
                rank_main(name, rank, folder / name)
            children[pid] = f"{name}{rank}"
    while set(children.values()) - {"stuck1"}:
        pid, _ = os.wait()
        children.pop(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def rank_main(name: str, rank: int, folder: Path) -> None:
    """One rank, to the end of its process."""
    try:
        found = SCENARIOS[name](rank, folder)
    except BaseException:
        found = traceback.format_exc()
    (folder / str(rank)).write_bytes(pickle.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    main(Path(sys.argv[1]), sys.argv[2:])
