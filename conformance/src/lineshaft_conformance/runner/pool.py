"""Runs checks in several child processes: a crash or a hang is that check's failure, and the run goes on.

Consecutive checks of one op or theme go to one child, since they share dear things; a child without work takes half of
what another one has left. Checks of speed run last, alone, in a process that may use every CPU.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import wait
from typing import Any

from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.runner.child import Child, Message
from lineshaft_conformance.subject import Target
from lineshaft_contract import errors
from lineshaft_contract.host import usable_cpus
from lineshaft_contract.ops.spec import Size

COLLECT = "lineshaft_conformance.levels:collect"
START_SECONDS = 120.0
"""How long a backend may take to load, start and list its kernels."""
POLL_SECONDS = 0.1
LOAD = "L0/load/start"
"""The id of the one failure that is left of a backend that does not start."""


@dataclass(frozen=True)
class Listed:
    """A check as a child lists it: all of it but the function."""

    id: str
    rule: str
    op: str
    dtype: str
    shape_class: str
    limit: float
    compiled_only: bool = False

    @property
    def level(self) -> int:
        return int(self.id[1])

    @property
    def theme(self) -> str:
        """Level and op or theme: "L1/attend"."""
        return "/".join(self.id.split("/")[:2])

    def failed(self, reason: str, seed: int, seconds: float) -> Result:
        """The result of a check whose process could not tell."""
        return Result(
            self.id, self.level, Status.FAIL, reason, self.op, self.dtype, self.shape_class, seconds=seconds, seed=seed
        )


@dataclass(frozen=True)
class Task:
    """One check with one seed."""

    check: Listed
    seed: int


class LoadFailed(Exception):
    """The backend does not load, start or list its kernels; the message says what it did."""


class Shares:
    """Hands out tasks: a worker goes through one theme, then takes another, then half of what another one has left."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._open = deque(deque(group) for _, group in groupby(tasks, key=lambda task: task.check.theme))
        self._taken: dict[Any, deque[Task]] = {}

    def __len__(self) -> int:
        """Tasks that are not handed out yet."""
        return sum(map(len, [*self._open, *self._taken.values()]))

    def next(self, worker: Any) -> Task | None:
        if not self._taken.get(worker):
            self._taken[worker] = self._open.popleft() if self._open else self._half()
        mine = self._taken[worker]
        return mine.popleft() if mine else None

    def _half(self) -> deque[Task]:
        largest = max(self._taken.values(), key=len, default=deque())
        taken = [largest.pop() for _ in range((len(largest) + 1) // 2)]
        return deque(reversed(taken))

    def give_back(self, worker: Any) -> None:
        """What a lost worker had before it."""
        if left := self._taken.pop(worker, None):
            self._open.appendleft(left)


class Worker:
    """A child, and the task it is at (None: it starts, or waits for one)."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.ready = False
        self.task: Task | None = None
        self.since = 0.0

    def fileno(self) -> int:
        return self.child.fileno()

    def begin(self, task: Task, limit: float) -> None:
        self.task, self.since = task, time.monotonic()
        self.child.ask({"do": "run", "id": task.check.id, "seed": task.seed}, limit)


class Pool:
    """Child processes with the backend started in each; use it as a context manager.

    jobs    processes at a time (None: half of the usable CPUs, so that each has two)
    limit   seconds for each check in place of its own
    `backend` holds what a child says of the backend and `checks` lists its checks; `no_start` is why a further child
    did not start, if one did not. Entering raises LoadFailed for a backend that does not start, and UnknownBackend,
    BackendUnavailable or ConfigError where the user is to act.
    """

    def __init__(
        self,
        target: Target,
        size: Size = "smoke",
        level: int = 5,
        *,
        jobs: int | None = None,
        limit: float | None = None,
        start_limit: float = START_SECONDS,
        collect: str = COLLECT,
    ) -> None:
        self._config = {"target": dataclasses.asdict(target), "size": size, "level": level, "collect": collect}
        self.jobs = jobs or max(1, usable_cpus() // 2)
        self.threads = min(2, usable_cpus())  # whatever `jobs` is, so that results do not hang on it
        self._limit, self._start_limit = limit, start_limit
        self._workers: list[Worker] = []
        self._most = 0
        self.no_start = ""
        self.backend: Message = {}
        self.checks: tuple[Listed, ...] = ()

    def __enter__(self) -> Pool:
        self._scratch = tempfile.TemporaryDirectory(prefix="lineshaft-conformance-", ignore_cleanup_errors=True)
        try:
            self._first()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()
        self.end()

    def _first(self) -> None:
        """Start one child and learn from it what there is to run."""
        worker = self._spawn(self.threads)
        while (said := worker.child.answer()) is None:
            wait([worker.fileno()], POLL_SECONDS)
        if "raised" in said:
            raise getattr(errors, said["raised"]["class"])(said["raised"]["message"])
        if "done" not in said:
            raise LoadFailed(complaint(said))
        worker.ready = True
        self.backend = said["done"]["backend"]
        self.checks = tuple(Listed(**check) for check in said["done"]["checks"])

    def _spawn(self, threads: int) -> Worker:
        worker = Worker(Child(self._config, threads, self._scratch.name))
        worker.child.ask({"do": "start"}, self._start_limit)
        self._workers.append(worker)
        return worker

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
        """Every task with its result, as they are done."""
        yield from self._run(Shares([task for task in tasks if not alone(task.check)]), self.jobs, self.threads)
        last = Shares([task for task in tasks if alone(task.check)])
        if last:
            self._close()
            yield from self._run(last, 1, usable_cpus())

    def _run(self, shares: Shares, jobs: int, threads: int) -> Iterator[tuple[Task, Result]]:
        self._most = jobs
        while shares or any(worker.task for worker in self._workers):
            while len(self._workers) < min(self._most, len(shares)):
                self._spawn(threads)
            for worker in self._workers:
                if worker.ready and not worker.task and (task := shares.next(worker)):
                    worker.begin(task, self._limit or task.check.limit)
            wait([worker.fileno() for worker in self._workers], POLL_SECONDS)
            for worker in list(self._workers):
                if worker.task or not worker.ready:
                    yield from self._hear(worker, shares)
            if not self._workers and not self._most:
                yield from self._give_up(shares)

    def _hear(self, worker: Worker, shares: Shares) -> Iterator[tuple[Task, Result]]:
        """What a worker has to say, if anything."""
        said = worker.child.answer()
        if said is None:
            return
        task, worker.task = worker.task, None
        worker.ready = "done" in said or (task is not None and "failed" in said)
        if not worker.ready:
            self._workers.remove(worker)
            worker.child.end()
            shares.give_back(worker)
        if task and "done" in said:
            yield task, Result.from_json(said["done"])
        elif task:
            yield task, task.check.failed(complaint(said), task.seed, time.monotonic() - worker.since)
        elif not worker.ready:  # perhaps a device that only so many processes may use at a time: go on with those
            self.no_start, self._most = complaint(said), len(self._workers)

    def _give_up(self, shares: Shares) -> Iterator[tuple[Task, Result]]:
        while task := shares.next(self):
            yield task, task.check.failed(f"the backend does not start again: {self.no_start}", task.seed, 0.0)

    def _close(self) -> None:
        """Let all children close their backends."""
        for worker in self._workers:
            worker.child.close()
        self._workers.clear()

    def end(self) -> None:
        """Kill all children at once, and remove what they left behind."""
        while self._workers:
            self._workers.pop().child.end()
        self._scratch.cleanup()


def complaint(said: Message) -> str:
    """Why an answer is none."""
    raised = said.get("raised", {})
    return str(said.get("lost") or said.get("failed") or raised.get("message") or f"answered {said!r}")


def alone(check: Listed) -> bool:
    """Whether nothing else may run at the same time."""
    return check.id.startswith("L5/speed/")
