"""What the scheduler plans, on a real model: windows that free pages, forks that share them, deadlines, rejections."""

from __future__ import annotations

import numpy as np
import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import config, drive, greedy

from lineshaft.engine import Engine
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Batch, FinishReason, Request

RNG = np.random.default_rng(3)
PROMPTS = [[int(token) for token in RNG.integers(1, 90, length)] for length in (30, 7, 19, 41)]


def finish(engine: Engine) -> None:
    for _ in range(500):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine does not get on")


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_layers_with_a_window_hold_fewer_pages_and_say_the_same(llama: Llama, overlap: str) -> None:
    """Gemma's layers of window 8: few pages of them serve texts of any length, beside much preemption."""
    path = llama("even-gemma3").path
    small = {"max_model_len": 64, "cache.page_size": 4, "scheduler.token_budget": 8, "overlap": overlap}
    with Engine(config(path, **small, **{"scheduler.max_rows": 1, "cache.prefix_caching": False})) as engine:
        alone = drive(engine, PROMPTS, greedy(16), look=False).tokens
        assert sorted(engine.pages) == [1 + 7, 1 + 16], "ceil((8 - 1 + 2 * 8) / 4) + 1 pages, and ceil(64 / 4)"
    with Engine(config(path, **small, **{"scheduler.max_rows": 4, "cache.pages": 20})) as engine:
        run = drive(engine, PROMPTS, greedy(16), look=False)
        twice = []
        for _ in range(2):
            twice.append(engine.add(PROMPTS[3], greedy(16)))
            finish(engine)
        engine.check_integrity()
        assert engine.pages == (20, 20)
    assert run.tokens == alone and run.preemptions > 0
    assert [request.cached for request in twice] == [0, 40] and [request.output for request in twice] == 2 * [alone[3]]


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_samples_of_a_prompt_share_its_pages(llama: Llama, overlap: str) -> None:
    settings = {"max_model_len": 64, "cache.page_size": 4, "cache.prefix_caching": False, "overlap": overlap}
    with Engine(config(llama("even").path, **settings)) as engine:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        parent = engine.add(PROMPTS[0], params)
        children = [engine.add(PROMPTS[0], params, parent=parent, fork=fork) for fork in (1, 2)]
        finish(engine)
        engine.check_integrity()
    assert [child.cached for child in children] == [29, 29]
    assert parent.output == children[0].output == children[1].output


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_deadlines_and_rejections_reach_the_caller(llama: Llama, overlap: str) -> None:
    settings = {"max_model_len": 64, "cache.page_size": 4, "cache.pages": 20, "overlap": overlap}
    with Engine(config(llama("even").path, **settings, **{"scheduler.preemption": "reject"})) as engine:
        late = engine.add(PROMPTS[1], greedy(50), deadline_s=0.0)
        ended = [token for token in engine.step() if token.request is late]
        assert late.finish_reason is FinishReason.DEADLINE and [token.token_id for token in ended] == [-1]
        requests: list[Request] = [engine.add(prompt, greedy(20)) for prompt in PROMPTS[:3]]
        finish(engine)
        engine.check_integrity()
    assert FinishReason.REJECTED in {request.finish_reason for request in requests}
    assert requests[0].finish_reason is FinishReason.LENGTH


def test_pages_come_back_in_the_step_that_saves_those_of_another(llama: Llama) -> None:
    settings = {
        "max_model_len": 40, "cache.page_size": 4, "scheduler.admission": "priority", "scheduler.fair_tenants": True,
        "scheduler.preemption": "swap", "scheduler.swap_pages": 64, "scheduler.max_rows": 2,
    }  # fmt: skip
    given = ((PROMPTS[2][:16], 12, b"a", 0), (PROMPTS[3][:12], 16, b"a", 0), (PROMPTS[3][:24], 8, b"b", 1))

    def run(pages: int) -> tuple[list[list[int]], int]:
        both = 0
        with Engine(config(llama("even").path, **settings, **{"cache.pages": pages})) as engine:
            schedule = engine._replicas[0].scheduler.schedule

            def watched(now: float) -> Batch:
                nonlocal both
                batch = schedule(now)
                both += bool(batch.swaps_out and batch.swaps_in)
                return batch

            engine._replicas[0].scheduler.schedule = watched  # type: ignore[method-assign, assignment]
            requests = [engine.add(ids, greedy(n), salt=salt, priority=rank) for ids, n, salt, rank in given]
            finish(engine)
            engine.check_integrity()
        return [request.output for request in requests], both

    roomy, tight = run(60), run(11)
    assert tight[0] == roomy[0] and tight[1] > 0 == roomy[1]
