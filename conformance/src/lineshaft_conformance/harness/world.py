"""A mesh of ranks of the backend under test: captures programs of collectives and runs them.

Each rank has a process, or all are one session here, where the backend runs them in a single program. Owns the
processes: a rank that fails, ends or hangs is a Failure, and takes the others with it.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lineshaft.errors import LayoutError
from lineshaft.plan import ProgramSpec
from lineshaft_conformance.checks import Failure, NotClaimed, require
from lineshaft_conformance.harness.rig import ONE, Rig, stored
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.backends import World
from lineshaft_contract.problems import ConstProblem
from lineshaft_contract.sessions import Cache, HostArray, SharedPending, Tree
from lineshaft_contract.steps import InputField, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Checkpoint, Coordinate, Local, Param

Axes = tuple[tuple[str, int], ...]
"""Mesh axes and their sizes, in the order of `World.axes`."""

START_SECONDS = 60.0
"""How long all ranks together may take to import the backend, and to capture programs."""

ANSWER_SECONDS = 20.0
"""How long a step may take."""

GRACE_SECONDS = 1.0
"""How long the other ranks may still answer once one has failed, so that the message names the first cause too."""

CLOSE_SECONDS = 5.0
"""How long all ranks together may take to close their sessions before they are killed."""

INPUT = "x"
RANK = "rank"


def mesh_axes(**degrees: int) -> Axes:
    """All axes in the order of `World.axes`; those that are not named have size 1."""
    return tuple({**ONE, **degrees}.items())


@dataclass(frozen=True)
class Collective:
    """One collective of a program: `source` 0 is the program's input, n the result of its n-th collective."""

    op: str
    axis: tuple[str, ...]
    statics: tuple[int, ...] = ()
    source: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What follows the array in a call of the op."""
        return (self.axis[0] if len(self.axis) == 1 else self.axis, *self.statics)


@dataclass(frozen=True)
class Exchange:
    """A program of collectives on one array of `shape` and `dtype` per rank."""

    dtype: str
    shape: tuple[int, ...]
    collectives: tuple[Collective, ...]

    def function(self, ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        """A StepFunction: output "0" is the rank's array handed through, "n" the result of the n-th collective.

        Where one session runs all ranks, the input holds the arrays of all; a weight tells each rank which is its own.
        """
        x = step.arrays[INPUT]
        values = [ops.gather_rows(x, weights[RANK]).reshape(*self.shape) if weights else x]
        for each in self.collectives:
            values.append(getattr(ops, each.op)(values[each.source], *each.arguments))
        return {str(i): value for i, value in enumerate(values)}, caches

    def program(self, ranks: int = 1) -> ProgramSpec:
        """The program, for a session of so many ranks."""
        shape = StepShape(tokens=1, rows=1, pages=(), logits=1, max_query=1)
        given = self.shape if ranks == 1 else (ranks, math.prod(self.shape))
        return ProgramSpec("exchange", self.function, shape, InputLayout([InputField(INPUT, self.dtype, given)]))


def rank_param(world: World) -> Param:
    """int32[1]: the number of a rank among those of its session. Each rank has another value."""

    def shard(checkpoint: Checkpoint, coordinate: Coordinate) -> Local:
        return Local((stored(np.array([rank_number(world, coordinate) - world.rank], np.int32)),))

    problem = ConstProblem(dtype="int32", shape=(1,))
    varies = tuple(axis for axis, degree in world.axes if degree > 1)
    return Param(RANK, RANK, (1,), "int32", {"const": problem}, shard, varies)


def rank_number(world: World, coordinate: Coordinate) -> int:
    """The rank at a place of the mesh."""
    at = [getattr(coordinate, axis) for axis, _ in world.axes]
    return int(np.ravel_multi_index(at, [degree for _, degree in world.axes]))


def capture(subject: Subject, exchanges: Sequence[Exchange], world: World) -> Rig:
    """A frozen session of a worker's ranks, with a program of each exchange. Raises NotClaimed, see `place`."""
    return Rig(
        subject, [exchange.program(world.ranks) for exchange in exchanges],
        params={RANK: rank_param(world)} if world.ranks > 1 else (), **place(subject, world),
    )  # fmt: skip


def place(subject: Subject, world: World) -> dict[str, Any]:
    """What a Rig at a place in a mesh is given: its kernels, degrees and session.

    Raises NotClaimed where a session of several ranks needs more devices than this machine has.
    """
    try:
        backend = subject.start(world)
        session = backend.session(world.rank)
    except LayoutError as error:
        if world.ranks == 1:
            raise
        raise NotClaimed(f"this machine cannot hold the mesh: {error}") from error
    return {"kernels": subject.kernels_of(backend), "degrees": dict(world.axes), "session": session}


def outputs(rig: Rig, program: int, x: HostArray) -> list[HostArray]:
    """One step of a captured exchange, in a session of one rank."""
    found = rig.run({INPUT: x}, program)
    return [found[str(i)] for i in range(len(found))]


def shared_outputs(rig: Rig, program: int, xs: Sequence[HostArray]) -> list[list[HostArray]]:
    """One step of a captured exchange in a session of several ranks: the outputs of each. Raises Failure."""
    pending = rig.submit({INPUT: np.stack(xs).reshape(len(xs), -1)}, program)
    found = [results(pending, str(i), len(xs)) for i in range(len(rig.planned.outputs[program]))]
    return [list(own) for own in zip(*found, strict=True)]


def results(pending: Any, name: str, ranks: int) -> list[HostArray]:
    """An output of every rank of a session of several; `result` must be the first rank's. Raises Failure."""
    shared: SharedPending = pending
    found, first = shared.results(name), shared.result(name)
    require(len(found) == ranks, f"results({name!r}) of a session of {ranks} ranks gives {len(found)} arrays")
    require(first.tobytes() == found[0].tobytes(), f"result({name!r}) is not the first of results({name!r})")
    return found


class Ranks(Protocol):
    """All ranks of a mesh."""

    def run(
        self, name: str, exchanges: Sequence[Exchange], program: int, xs: Sequence[HostArray]
    ) -> tuple[tuple[str, ...], list[list[HostArray]]]:
        """The kernels' names and, per rank, the outputs of `exchanges[program]` on that rank's array.

        All exchanges of one `name` are captured together, in a world of their own, when one of them is run first.
        Raises Failure.
        """
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


def make_ranks(subject: Subject, axes: Axes) -> Ranks:
    """The ranks of a mesh, as the backend runs them."""
    return OneProgram(subject, axes) if subject.info.single_program else Mesh(subject.target, axes)


class OneProgram:
    """Ranks of a single-program backend: one session of all of them, in this process, which may own the devices."""

    def __init__(self, subject: Subject, axes: Axes) -> None:
        self._subject, self._axes = subject, axes
        self._rigs: dict[str, Rig] = {}

    def run(
        self, name: str, exchanges: Sequence[Exchange], program: int, xs: Sequence[HostArray]
    ) -> tuple[tuple[str, ...], list[list[HostArray]]]:
        """See `Ranks`. Raises NotClaimed where this machine has too few devices."""
        if name not in self._rigs:
            self._rigs[name] = capture(self._subject, exchanges, World(axes=self._axes, threads=1, ranks=len(xs)))
        rig = self._rigs[name]
        return collective_kernels(self._subject, rig), shared_outputs(rig, program, xs)

    def close(self) -> None:
        """Idempotent: closes the sessions. A later `run` starts new ones."""
        while self._rigs:
            self._rigs.popitem()[1].session.close()


def collective_kernels(subject: Subject, rig: Rig) -> tuple[str, ...]:
    """The kernels of collectives that the plan chose, each once."""
    entries = rig.planned.plan.entries
    return tuple(dict.fromkeys(entry.kernel for entry in entries if subject.ops[entry.op].collective))


@dataclass
class Child:
    """The process of one rank, and the connection to it. It ends when its stdin does."""

    process: subprocess.Popen[bytes]
    peer: Connection[Any, Any]

    def stop(self, seconds: float) -> None:
        """Wait for the process to end by itself, then end it."""
        try:
            self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.communicate()


class Mesh:
    """Ranks in a process each. They start when first needed and again after a failure, which ends all of them."""

    def __init__(self, target: Target, axes: Axes) -> None:
        self._target, self._axes = target, axes
        self._children: list[Child] = []
        self._folder = Path()
        self._numbers = itertools.count()
        self._kernels: dict[str, tuple[str, ...]] = {}
        self._failed: dict[str, str] = {}

    def run(
        self, name: str, exchanges: Sequence[Exchange], program: int, xs: Sequence[HostArray]
    ) -> tuple[tuple[str, ...], list[list[HostArray]]]:
        """See `Ranks`. Raises Failure; then every later call with this name does at once."""
        if name in self._failed:
            raise Failure(f"the mesh broke before, on {name}: {self._failed[name]}")
        try:
            if name not in self._kernels:
                self._capture(name, exchanges)
            return self._kernels[name], self._ask([("run", name, program, x) for x in xs], ANSWER_SECONDS)
        except Failure as failure:
            self._failed[name] = str(failure)
            self._stop(0.0)
            raise

    def _capture(self, name: str, exchanges: Sequence[Exchange]) -> None:
        if not self._children:
            self._start()
        rendezvous = str(self._folder / f"rendezvous{next(self._numbers)}")
        worlds = [World(rank, self._axes, rendezvous, threads=1) for rank in range(len(self._children))]
        kernels = self._ask([("capture", name, list(exchanges), world) for world in worlds], START_SECONDS)
        self._kernels[name] = kernels[0]

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lineshaft-mesh-"))
        size = World(axes=self._axes).size
        self._children = [_spawn(self._folder) for _ in range(size)]
        self._ask([("start", self._target)] * size, START_SECONDS)

    def _ask(self, messages: Sequence[tuple[Any, ...]], seconds: float) -> list[Any]:
        """Send each rank its message; all answers. The first failure ends the wait."""
        answers: dict[int, Any] = {}
        wrong: dict[int, str] = {}
        waiting = {child.peer: rank for rank, child in enumerate(self._children)}
        for rank, message in enumerate(messages):
            self._send(rank, message, wrong)
        deadline = time.monotonic() + (GRACE_SECONDS if wrong else seconds)
        while waiting and (ready := wait(list(waiting), max(deadline - time.monotonic(), 0.0))):
            for peer in ready:
                rank = waiting.pop(peer)  # type: ignore[call-overload]
                self._take(rank, answers, wrong)
            if wrong:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if waiting and not wrong:
            wrong = dict.fromkeys(waiting.values(), f"gives no answer within {seconds:g} s")
        if wrong:
            raise Failure("; ".join(f"rank {rank} {wrong[rank]}" for rank in sorted(wrong)))
        return [answers[rank] for rank in sorted(answers)]

    def _send(self, rank: int, message: tuple[Any, ...], wrong: dict[int, str]) -> None:
        try:
            self._children[rank].peer.send(message)
        except OSError:
            wrong[rank] = self._end(rank)

    def _take(self, rank: int, answers: dict[int, Any], wrong: dict[int, str]) -> None:
        try:
            fine, answer = self._children[rank].peer.recv()
        except (EOFError, OSError):
            fine, answer = False, self._end(rank)
        (answers if fine else wrong)[rank] = answer

    def _end(self, rank: int) -> str:
        try:
            status = self._children[rank].process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def close(self) -> None:
        """Idempotent: ends all ranks, by force if they do not end by themselves. A later `run` starts new ones."""
        self._stop(CLOSE_SECONDS)

    def _stop(self, seconds: float) -> None:
        children, self._children, self._kernels = self._children, [], {}
        for child in children:
            child.peer.close()
        deadline = time.monotonic() + seconds
        for child in children:
            child.stop(deadline - time.monotonic())
        if children:
            shutil.rmtree(self._folder, ignore_errors=True)


def _spawn(folder: Path) -> Child:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "lineshaft_conformance.harness.world", str(theirs.fileno()), str(folder)]
    with theirs:  # what the backend prints must not mix with what this process prints to stdout
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
        )
    return Child(process, Connection(ours.detach()))


# ---- in the process of a rank -----------------------------------------------------------------------------------


class Member:
    """One rank: the backend, and its sessions by name."""

    def __init__(self) -> None:
        self._subject: Subject | None = None
        self._rigs: dict[str, Rig] = {}

    def serve(self, peer: Connection[Any, Any]) -> None:
        """Answer (True, answer) or (False, what was raised) to each message, until the other end is gone."""
        calls: Mapping[str, Any] = {"start": self._start, "capture": self._capture, "run": self._run}
        while True:
            try:
                call, *arguments = peer.recv()
            except (EOFError, OSError):
                break
            try:
                answer = (True, calls[call](*arguments))
            except Exception as error:  # the check fails with it
                answer = (False, f"raised {type(error).__name__}: {' '.join(str(error).split())}")
            peer.send(answer)
        for rig in self._rigs.values():
            rig.session.close()

    def _start(self, target: Target) -> None:
        self._subject = Subject(target)

    def _capture(self, name: str, exchanges: Sequence[Exchange], world: World) -> tuple[str, ...]:
        assert self._subject is not None
        self._rigs[name] = capture(self._subject, exchanges, world)
        return self._rigs[name].kernels

    def _run(self, name: str, program: int, x: HostArray) -> list[HostArray]:
        return outputs(self._rigs[name], program, x)


def _watch(folder: str) -> None:
    """End this process as soon as its stdin does, whatever the main thread is waiting for."""
    while os.read(0, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main() -> None:
    """`python -m lineshaft_conformance.harness.world SOCKET_FD FOLDER`; Ctrl-C is the starter's business.

    The folder goes with the first rank that ends: a killed starter leaves nobody else to remove it, and the watch may
    not come to it before this thread has ended the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, folder = sys.argv[1:]
    threading.Thread(target=_watch, args=(folder,), daemon=True).start()
    try:
        Member().serve(Connection(int(descriptor)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
