"""Runs an engine on prompts, step by step, and keeps what it saw: logits, tokens, and which steps were mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tests.integration.oracle import Array, Expected

from lineshaft.config import EngineConfig, make_config
from lineshaft.engine import Engine
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Request

TPU_ON_CPU: dict[str, Any] = {
    "backend": "tpu", "backend_options.platform": "cpu", "backend_options.cache_dir": "off",
}  # fmt: skip
"""The TPU backend where there is no TPU, with nothing left over from an earlier run."""

BACKENDS: dict[str, dict[str, Any]] = {"cpu": {}, "tpu": TPU_ON_CPU}
"""The backends that run a whole engine here in reasonable time, as `config` takes them."""

STEPS = 5000
"""More than any test here needs: an engine that does not get on fails instead of hanging."""

_salts = count()


def config(model: Path | str, **more: Any) -> EngineConfig:
    """A small engine on the CPU backend in float32; `more` overrules, with dotted keys ("cache.pages") too."""
    values: dict[str, Any] = {
        "model": str(model), "backend": "cpu", "dtype": "float32", "threads": 1, "max_logprobs": 0,
        "sampling_extras": False,
        "scheduler.max_rows": 4, "scheduler.token_budget": 64,
    }  # fmt: skip
    return make_config(**{**values, **more})


def greedy(tokens: int) -> SamplingParams:
    """The likeliest token, `tokens` times."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


@dataclass
class Run:
    """What became of some prompts, in their order."""

    requests: list[Request] = field(default_factory=list)
    seen: dict[int, list[tuple[int, Array]]] = field(default_factory=dict)  # request id -> (position, logits [V])
    steps: int = 0
    mixed_steps: int = 0  # steps that both decoded and prefilled

    @property
    def tokens(self) -> list[list[int]]:
        return [list(request.output) for request in self.requests]

    @property
    def logits(self) -> list[Array]:
        """By request, logits [n, V]. Asserts that each position was sampled exactly once."""
        for request in self.requests:
            first = len(request.prompt)
            positions = [position for position, _ in self.seen[request.id]]
            assert positions == list(range(first, first + len(request.output)))
        return [np.stack([row for _, row in self.seen[request.id]]) for request in self.requests]

    @property
    def preemptions(self) -> int:
        return sum(request.preemptions for request in self.requests)


def drive(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    forced: Sequence[Sequence[int]] | None = None,
    arrivals: Sequence[int] | None = None,
    salt: bytes | None = None,
    look: bool = True,
) -> Run:
    """Run prompts to their end and check the engine's books after every step.

    forced: tokens to take instead of the sampled ones; arrivals: before which step each prompt is added (default: all
    at once); salt: runs of equal salt share prefixes (default: this run shares none); look: whether to see logits.
    """
    salt = f"run {next(_salts)}".encode() if salt is None else salt
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    starts = [0] * len(prompts) if arrivals is None else list(arrivals)
    run = Run()
    order: dict[int, int] = {}  # request id -> which prompt

    def teacher(request: Request, logits: Array) -> int | None:
        run.seen.setdefault(request.id, []).append((len(request.tokens), np.array(logits)))
        return None if forced is None else forced[order[request.id]][len(request.output)]

    engine.teacher = teacher if look else None
    try:
        while engine.has_work or len(run.requests) < len(prompts):
            for i in [i for i, start in enumerate(starts) if start == run.steps]:
                request = engine.add(prompts[i], each[i], salt=salt)
                order[request.id] = i
                run.requests.append(request)
            before = {request.id: (request.remaining, request.computed) for request in run.requests}
            engine.step()
            engine.check_integrity()
            run.steps += 1
            run.mixed_steps += _mixed(run.requests, before)
            assert run.steps < STEPS, "the engine does not get on"
    finally:
        engine.teacher = None
    run.requests.sort(key=lambda request: order[request.id])
    return run


def _mixed(requests: Sequence[Request], before: dict[int, tuple[int, int]]) -> bool:
    """Whether the last step took a request's newest token and also part of another's prompt."""
    kinds = set()
    for request in requests:
        remaining, computed = before[request.id]
        if request.computed > computed:
            kinds.add("decode" if remaining == 1 else "prefill")
    return len(kinds) == 2


def follow(engine: Engine, expected: Sequence[Expected], **more: Any) -> Run:
    """Drive the engine along the oracle's tokens."""
    return drive(
        engine,
        [item.prompt for item in expected],
        [greedy(len(item.tokens)) for item in expected],
        forced=[item.tokens for item in expected],
        **more,
    )
