"""A real engine over the subject, on which a scenario is played; afterwards every step is held to the reference.

Knows requests and steps; which scenarios there are is no business of this file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lineshaft.config import EngineConfig, make_config
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Request
from lineshaft_conformance.checks import Failure, Found, require
from lineshaft_conformance.harness.replay import Compared, Reference, compare_step
from lineshaft_conformance.harness.rig import kernel_names
from lineshaft_conformance.harness.watched import Row, Step, watched_engine
from lineshaft_conformance.subject import Subject
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.logits import logprobs
from lineshaft_contract.ops.spec import EXACT, Numerics
from lineshaft_contract.problems import SampleProblem

MOST_STEPS = 2000
"""More than any scenario needs: an engine that does not get on fails instead of hanging."""
DECIDED = 0.9
"""Share of float32 tokens that the float64 logits must decide; the tiny models' logits are far apart."""


def engine_config(subject: Subject, model: Path, dtype: str, page_size: int, **more: Any) -> EngineConfig:
    """A small engine on the subject; `more` overrules, with dotted keys ("cache.pages") too."""
    values: dict[str, Any] = {
        "model": str(model), "backend": subject.info.name, "backend_options": dict(subject.target.options),
        "dtype": dtype, "threads": 1, "max_logprobs": 0, "sampling_extras": False,
        "cache.page_size": page_size, "cache.pages": 96, "max_model_len": 8 * page_size, "scheduler.max_rows": 4,
        "scheduler.token_budget": 32, "tuning": "off",
    }  # fmt: skip
    return make_config(**{**values, **more})


def smallest_page(subject: Subject, least: int) -> int:
    """The smallest page size of at least so many tokens that the subject takes, else the largest that it takes."""
    sizes = subject.capabilities.page_sizes or (least,)
    return min((size for size in sizes if size >= least), default=max(sizes))


class Stage:
    """One engine, and what was seen of it. Use it as a context manager."""

    def __init__(self, subject: Subject, model: Path, dtype: str, seed: int, page_size: int, **settings: Any) -> None:
        self.subject, self.dtype, self.page_size = subject, dtype, page_size
        self.config = engine_config(subject, model, dtype, page_size, **settings)
        self.rng = np.random.default_rng([seed, 44])
        self.engine, self.watched = watched_engine(subject, self.config)
        self.requests: list[Request] = []
        self.held: dict[int, set[int]] = defaultdict(set)  # request id -> every page that it ever held

    # ---- playing -----------------------------------------------------------------------------------------------

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return [int(token) for token in self.rng.integers(0, self.engine.vocab, length)]

    def add(self, prompt: Sequence[int], tokens: int, **params: Any) -> Request:
        """Queue a prompt for so many tokens, greedy unless `params` say otherwise."""
        given = SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, **params})
        self.requests.append(self.engine.add(prompt, given))
        return self.requests[-1]

    def step(self, count: int = 1) -> None:
        """Steps of the engine; after each its books must balance."""
        for _ in range(count):
            self.engine.step()
            self.engine.check_integrity()
            for live in self.engine.requests():
                if live.request.computed:
                    self.held[live.request.id].update(self.engine.caches[0].pages(live.request.id))

    def finish(self) -> None:
        """Steps until nothing is left to do."""
        for _ in range(MOST_STEPS):
            if not self.engine.has_work:
                return
            self.step()
        raise Failure(f"the engine did not finish within {MOST_STEPS} steps")

    # ---- what happened -----------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[Step]:
        return self.watched.steps

    def rows(self) -> list[list[Row]]:
        """The rows of every step."""
        return [step.rows(self.page_size) for step in self.steps]

    def happened(self, what: str, seen: object) -> None:
        """A scenario that tests nothing must not pass."""
        require(seen, f"the scenario did not come about: {what}")

    # ---- judging -----------------------------------------------------------------------------------------------

    def judge(self) -> Found:
        """Every step beside the reference, and no page lost. Raises Failure."""
        for request in self.requests:
            require(request.finished, f"request {request.id} did not finish")
            require(request.finish_reason != "error", f"request {request.id} ended in NaN logits")
        used = [self.engine.caches[0].used_pages(group) for group in range(len(self.engine.pages))]
        require(not any(used), f"{used} pages of the cache groups are still held after every request has ended")
        compared = self._compare()
        for i, (step, found) in enumerate(zip(self.steps, compared, strict=True)):
            require(not found.wrong, f"step {i} of {len(compared)} ({step.message.shape}): {found.wrong}")
        rows, decided = sum(c.rows for c in compared), sum(c.decided for c in compared)
        if self.dtype == "float32":
            require(decided >= DECIDED * rows, f"float64 logits decide only {decided} of {rows} tokens: no evidence")
        worst = max((c.worst for c in compared), key=lambda d: d.share)
        outputs = [array for step in self.steps for array in (step.logits[: step.live], step.token_ids[: step.live])]
        note = f"{len(compared)} steps, {rows} rows of logits, {decided} tokens decided by float64"
        return Found(kernel_names(self.engine.plan), (worst,), outputs, (note, f"plan {self.engine.plan.hash}"))

    def _compare(self) -> list[Compared]:
        exact, run = self._reference("float64"), self._reference(self.dtype)
        found = []
        for step in self.steps:
            message = step.message
            found.append(compare_step(step, exact.logits(message), run.logits(message), self.dtype, exact.depth))
            check_logprobs(step)
        return found

    def _reference(self, dtype: str) -> Reference:
        shapes = [step.message.shape for step in self.steps]
        return Reference(self.config, self.subject.registry, dtype, self.page_size, self.engine.pages, shapes)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def check_logprobs(step: Step) -> None:
    """The log-probabilities of a step are those of its own logits, by the op's own tolerance."""
    if step.logprobs is None:
        return
    got, ids = step.logprobs, step.token_ids[: step.live]
    own, k = step.logits[: step.live], got.top.shape[1]
    problem = SampleProblem(dtype="float32", rows=len(own), vocab=own.shape[1], top=k)
    exact = logprobs(problem, own, ids, k, num=EXACT)
    run = logprobs(problem, own, ids, k, num=Numerics("float32", "float32"))
    rule = all_ops()["logprobs"].tolerance
    for name, given, right, usual in zip(("chosen", "top_ids", "top"), (got.chosen, got.top_ids, got.top), exact, run,
                                         strict=True):  # fmt: skip
        wrong = rule.check(problem, given[: step.live], right, usual)
        require(not wrong, f"logprobs of a step, {name}: {wrong}")
