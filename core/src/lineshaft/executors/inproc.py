"""Workers in this process: one, or for a backend of a single program one for each dp replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from lineshaft.config import EngineConfig
from lineshaft.executors.base import one_program, size_alike
from lineshaft.registry import Registry
from lineshaft.runner.messages import ChoiceMessage, Sizes, Started, StepMessage, StepResult
from lineshaft.runner.setup import check_layout, degrees_of
from lineshaft.runner.worker import Progress, Worker
from lineshaft_contract.backends import Backend, World

T = TypeVar("T")


class InprocExecutor:
    """An executor without processes of its own. `start` makes the backends instead of their factory.

    A lone worker runs in the caller's thread, unless `overlap` is "on": then, and where there are several, each has a
    thread of its own for all of its life, as libraries keep state by thread.
    """

    def __init__(
        self, config: EngineConfig, registry: Registry, start: Callable[[World], Backend] | None = None
    ) -> None:
        degrees = degrees_of(config)
        if degrees.world > 1:
            check_layout(config, registry)
        ranks = range(0, degrees.world, degrees.replica if one_program(config, registry) else 1)
        self.beside = len(ranks) > 1 or config.overlap == "on"
        self._threads = [ThreadPoolExecutor(1) for _ in ranks] if self.beside else []
        self._workers: list[Worker] = []
        self._running: list[Future[None]] = []
        try:
            for index, rank in enumerate(ranks):
                make = partial(Worker, config, rank, registry=registry, start=start)
                self._workers.append(self._threads[index].submit(make).result() if self.beside else make())
        except BaseException:
            self.close()
            raise

    def size(self) -> list[Sizes]:
        return size_alike(lambda settled: self._all([partial(worker.size, settled) for worker in self._workers]))

    def start(self, pages: tuple[int, ...], progress: Progress) -> list[Started]:
        return self._all([partial(worker.start, pages, progress) for worker in self._workers])

    def submit(self, steps: Sequence[StepMessage]) -> None:
        self._running = []
        self._each([partial(w.submit, step) for w, step in zip(self._workers, steps, strict=True)])

    def choose(self, choices: Sequence[ChoiceMessage]) -> None:
        self._each([partial(w.choose, choice) for w, choice in zip(self._workers, choices, strict=True)])

    def collect(self) -> list[StepResult]:
        for done in self._running:
            done.result()
        return self._all([worker.collect for worker in self._workers])

    def _each(self, calls: Sequence[Callable[[], None]]) -> None:
        """Do each worker's call in its thread and go on; what fails is raised by `collect`."""
        if self._threads:
            self._running += [thread.submit(call) for thread, call in zip(self._threads, calls, strict=True)]
        else:
            calls[0]()

    def _all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Do each worker's call and wait for all, also where one fails: none is to be at work when this returns."""
        if not self._threads:
            return [call() for call in calls]
        waiting = [thread.submit(call) for thread, call in zip(self._threads, calls, strict=False)]
        wait(waiting)
        return [future.result() for future in waiting]

    def close(self) -> None:
        workers, self._workers = self._workers, []
        with ExitStack() as stack:
            for thread in self._threads:
                stack.callback(thread.shutdown)
            if workers:
                stack.callback(self._all, [worker.close for worker in workers])
