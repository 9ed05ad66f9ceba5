"""Windows, chunks, prefix hits, preemption of each kind, forks and overlapped steps together: the oracle's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import STEPS, config
from tests.integration.oracle import Array, Expected, check_float32

from lineshaft.engine import Engine
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Request

TOKENS, FORKS = 10, 3
PAGES = {"max_model_len": 72, "cache.page_size": 4, "scheduler.token_budget": 12, "scheduler.max_rows": 8}
FEATURES: dict[str, dict[str, Any]] = {
    "chunks": {"cache.prefix_caching": False},
    "prefix": {},
    "recompute": {"cache.pages": 24},
    "swap": {"cache.pages": 24, "scheduler.preemption": "swap", "scheduler.swap_pages": 400},
    "overlap": {"cache.pages": 24, "scheduler.preemption": "swap", "scheduler.swap_pages": 400, "overlap": "on"},
}


def run(engine: Engine, expected: list[list[Expected]]) -> tuple[list[Request], dict[int, list[Array]]]:
    """Each prompt with all its samples, a prompt every second step, every sample along its own tokens."""
    waiting, requests = list(expected), list[Request]()
    forced: dict[int, list[int]] = {}
    seen: dict[int, list[Array]] = {}

    def teacher(request: Request, logits: Array) -> int:
        seen.setdefault(request.id, []).append(np.array(logits))
        return forced[request.id][len(request.output)]

    engine.teacher = teacher
    for step in range(STEPS):
        if waiting and step % 2 == 0:
            parent = None
            for fork, item in enumerate(waiting.pop(0)):
                params = SamplingParams(temperature=0.7, seed=1, max_tokens=TOKENS, ignore_eos=True)
                request = engine.add(item.prompt, params, parent=parent, fork=fork)
                parent = parent or request
                forced[request.id] = item.tokens
                requests.append(request)
        if not (engine.has_work or waiting):
            return requests, seen
        engine.step()
        engine.check_integrity()
    raise AssertionError("the engine does not get on")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("variant", ["gemma3", "even", "qwen3-moe", "deepseek-v2"])
def test_samples_of_prompts_that_share_a_start(llama: Llama, variant: str, feature: str) -> None:
    checkpoint = llama(variant)
    oracle = checkpoint.oracle
    rng = np.random.default_rng(3)
    start = oracle.prompts(1, [26])[0]
    prompts = [[*start[:cut], *oracle.prompts(10 + cut, [length])[0]] for cut, length in ((26, 9), (26, 3), (9, 20))]
    expected = []
    for prompt in prompts:
        tokens = [rng.integers(0, oracle.vocab, TOKENS).tolist() for _ in range(FORKS)]
        expected.append([Expected(prompt, own, oracle.after(prompt, own)) for own in tokens])
    with Engine(config(checkpoint.path, **{**PAGES, **FEATURES[feature]})) as engine:
        requests, seen = run(engine, expected)
        stats = engine.metrics()
        swaps = engine.schedulers[0].stats.counters.swaps
        assert all(cache.used_pages(group) == 0 for cache in engine.caches for group in range(len(cache.groups)))
    check_float32([item for group in expected for item in group], [np.stack(seen[r.id]) for r in requests])
    assert all(len(seen[r.id]) == TOKENS for r in requests)
    assert (stats.preemptions > 0) == ("cache.pages" in FEATURES[feature])
    assert (swaps > 0) == (feature in ("swap", "overlap"))
    assert any(r.cached == len(r.prompt) - 1 for r in requests if r.parent is not None)
    assert (requests[FORKS].cached > 0) == (feature != "chunks")
