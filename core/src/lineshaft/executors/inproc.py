"""One worker in this process."""

from __future__ import annotations

from collections.abc import Sequence

from lineshaft.config import EngineConfig
from lineshaft.registry import Registry
from lineshaft.runner.messages import Sizes, Started, StepMessage, StepResult
from lineshaft.runner.worker import Progress, Worker


class InprocExecutor:
    """An executor of world size 1."""

    def __init__(self, config: EngineConfig, registry: Registry) -> None:
        self._worker = Worker(config, registry=registry)

    def size(self) -> list[Sizes]:
        return [self._worker.size()]

    def start(self, pages: tuple[int, ...], progress: Progress) -> list[Started]:
        return [self._worker.start(pages, progress)]

    def execute(self, steps: Sequence[StepMessage]) -> list[StepResult]:
        return [self._worker.execute(step) for step in steps]

    def close(self) -> None:
        self._worker.close()
