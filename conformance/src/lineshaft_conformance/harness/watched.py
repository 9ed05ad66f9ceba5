"""The subject under the real engine: one worker whose every step is kept, and that finds NaN wherever no step may read.

Knows messages and pages; no model and no scenario.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.runner.messages import ChoiceMessage, Sizes, Started, StepMessage, StepResult
from lineshaft.runner.worker import Progress, Worker
from lineshaft.sampling.logprobs import Logprobs
from lineshaft_conformance.subject import Subject
from lineshaft_contract.sessions import HostArray


@dataclass(frozen=True)
class Row:
    """One row of a step: `count` tokens from position `start` on; the pages of its whole context."""

    start: int
    count: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What one step was given and what it gave: token ids int32 [R], logits f32 [R, V]."""

    message: StepMessage
    choice: ChoiceMessage
    token_ids: HostArray
    logits: HostArray
    logprobs: Logprobs | None

    @property
    def live(self) -> int:
        """How many logit rows are no padding. They lie at the ends of rows, so they increase, and padding is 0; a step
        that samples nothing counts as one, the first token's."""
        rows = self.message.forward["logit_rows"]
        grows = np.concatenate([[True], rows[1:] > rows[:-1]])
        return len(rows) if grows.all() else int(np.argmin(grows))

    def rows(self, page_size: int) -> list[Row]:
        """The rows that are no padding."""
        host = self.message.forward
        counts = np.diff(host["query_starts"])
        found = zip(counts, host["context_lens.0"], host["page_table.0"], strict=True)
        return [
            Row(int(context - count), int(count), tuple(map(int, table[: -(-context // page_size)])))
            for count, context, table in found
            if count
        ]


class WatchedExecutor:
    """Runs one worker of the subject in this process (an `Executor`), asks for the logits of every step, and keeps all
    of them in `steps`. Before each step the null page and the pages that `unused(group)` names are filled with poison.
    """

    beside = False

    def __init__(self, subject: Subject, config: EngineConfig) -> None:
        self.worker = Worker(config, registry=subject.registry, start=subject.start)
        self.steps: list[Step] = []
        self.unused: Callable[[int], Sequence[int]] = lambda group: ()

    def size(self) -> list[Sizes]:
        return [self.worker.size()]

    def start(self, pages: tuple[int, ...], progress: Progress) -> list[Started]:
        started = self.worker.start(pages, progress)
        self._poison = [self._poisoned(cache, pages[p.group]) for cache, p in enumerate(self.worker.setup.caches)]
        self._fill(lambda group: range(pages[group]))
        return [started]

    def submit(self, steps: Sequence[StepMessage]) -> None:
        (self._message,) = steps
        self._fill(self.unused)
        self.worker.submit(self._message)

    def choose(self, choices: Sequence[ChoiceMessage]) -> None:
        (self._choice,) = choices
        self.worker.choose(replace(self._choice, logits=True))

    def collect(self) -> list[StepResult]:
        result = self.worker.collect()
        assert result.logits is not None
        self.steps.append(
            Step(self._message, self._choice, result.token_ids.copy(), result.logits.copy(), result.logprobs)
        )
        return [result]

    def close(self) -> None:
        self.worker.close()

    def _poisoned(self, cache: int, pages: int) -> dict[str, HostArray]:
        """As many pages of poison as the pool has."""
        one = self.worker.session.read_pages(cache, np.zeros(1, np.int32))
        return {name: np.full((pages, *page.shape[1:]), poison(page.dtype), page.dtype) for name, page in one.items()}

    def _fill(self, unused: Callable[[int], Sequence[int]]) -> None:
        """One write per cache, always of the same length: the ids are padded with the null page."""
        for cache, pages in enumerate(self._poison):
            found = unused(self.worker.setup.caches[cache].group)
            ids = np.zeros(len(next(iter(pages.values()))), np.int32)
            ids[: len(found)] = found
            self.worker.session.write_pages(cache, ids, pages).wait()


def poison(dtype: np.dtype[Any]) -> Any:
    """NaN, or for integers their largest value."""
    return np.iinfo(dtype).max if dtype.kind in "iu" else np.nan


def watched_engine(subject: Subject, config: EngineConfig) -> tuple[Engine, WatchedExecutor]:
    """An engine over the subject, and the executor that watches it. The caller closes the engine."""
    executor = WatchedExecutor(subject, config)
    engine = Engine(config, registry=subject.registry, executor=executor)
    executor.unused = engine.caches[0].unused_pages
    return engine, executor
