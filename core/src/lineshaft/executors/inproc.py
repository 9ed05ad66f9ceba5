"""Workers in this process: one, or for a backend of a single program one for each dp replica."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack

from lineshaft.config import EngineConfig
from lineshaft.contract.backends import Backend, World
from lineshaft.executors.base import one_program
from lineshaft.registry import Registry
from lineshaft.runner.messages import Sizes, Started, StepMessage, StepResult
from lineshaft.runner.setup import check_layout, degrees_of
from lineshaft.runner.worker import Progress, Worker


class InprocExecutor:
    """An executor without processes of its own. `start` makes the backends instead of their factory."""

    def __init__(
        self, config: EngineConfig, registry: Registry, start: Callable[[World], Backend] | None = None
    ) -> None:
        degrees = degrees_of(config)
        if degrees.world > 1:
            check_layout(config, registry)
        ranks = range(0, degrees.world, degrees.replica if one_program(config, registry) else 1)
        self._threads = ThreadPoolExecutor(len(ranks)) if len(ranks) > 1 else None
        self._workers: list[Worker] = []
        try:
            for rank in ranks:
                self._workers.append(Worker(config, rank, registry=registry, start=start))
        except BaseException:
            self.close()
            raise

    def size(self) -> list[Sizes]:
        return [worker.size() for worker in self._workers]

    def start(self, pages: tuple[int, ...], progress: Progress) -> list[Started]:
        return [worker.start(pages, progress) for worker in self._workers]

    def execute(self, steps: Sequence[StepMessage]) -> list[StepResult]:
        if self._threads is None:
            return [self._workers[0].execute(steps[0])]
        waiting = [self._threads.submit(w.execute, step) for w, step in zip(self._workers, steps, strict=True)]
        wait(waiting)  # all of them, also where one fails: none is to be at work when this returns
        return [future.result() for future in waiting]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        with ExitStack() as stack:
            for worker in self._workers:
                stack.callback(worker.close)
