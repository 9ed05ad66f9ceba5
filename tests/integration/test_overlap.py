"""Scheduling a step while the one before runs changes no token: the same requests with overlap on and off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import Run, config, drive

from lineshaft.engine import Engine
from lineshaft.executors import make_executor
from lineshaft.registry import discover
from lineshaft.runner.messages import StepResult
from lineshaft.sampling.params import SamplingParams

RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(0, 90, n).tolist() for n in (3, 40, 17, 90, 1, 28)]
ARRIVALS = [0, 0, 1, 3, 4, 9]


def params(index: int, **more: Any) -> SamplingParams:
    temperature = 0.0 if index % 2 else 0.9
    return SamplingParams(temperature=temperature, max_tokens=6 + 5 * index, seed=index, **more)


def run(llama: Llama, overlap: str, each: Sequence[SamplingParams], **more: Any) -> Run:
    settings = config(llama("even").path, max_model_len=160, overlap=overlap, **{"cache.page_size": 8, **more})
    with Engine(settings) as engine:
        found = drive(engine, PROMPTS, each, arrivals=ARRIVALS, look=False)
        assert all(cache.used_pages() == 0 for cache in engine.caches)
    return found


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"cache.pages": 22},
        {"cache.pages": 22, "scheduler.preemption": "swap", "scheduler.swap_pages": 64},
        {"layout.dp": 2},
        {"cache.prefix_caching": False, "scheduler.token_budget": 16},
    ],
    ids=["plain", "preempted", "swapped", "dp2", "chunks"],
)
def test_overlap_changes_no_token(llama: Llama, more: dict[str, Any]) -> None:
    each = [params(i, ignore_eos=True) for i in range(len(PROMPTS))]
    off, on = run(llama, "off", each, **more), run(llama, "on", each, **more)
    assert on.tokens == off.tokens
    assert [len(tokens) for tokens in on.tokens] == [one.max_tokens for one in each]
    if "cache.pages" in more:
        assert on.preemptions and off.preemptions


def test_a_stop_token_ends_a_request_whose_next_row_is_under_way(llama: Llama) -> None:
    free = run(llama, "off", [params(i, ignore_eos=True) for i in range(len(PROMPTS))])
    stops = [tokens[len(tokens) // 2] for tokens in free.tokens]
    each = [params(i, stop_token_ids=[stop]) for i, stop in enumerate(stops)]
    off, on = run(llama, "off", each), run(llama, "on", each)
    assert on.tokens == off.tokens
    assert [request.finish_reason for request in on.requests] == ["stop"] * len(PROMPTS)
    assert all(tokens[-1] == stop for tokens, stop in zip(on.tokens, stops, strict=True))


def test_the_next_step_is_on_its_way_when_a_step_returns(llama: Llama) -> None:
    calls: list[str] = []

    class Watched:
        def __init__(self, settings: Any) -> None:
            self._inner = make_executor(settings, discover())

        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                calls.append(name)
                return getattr(self._inner, name)(*given)

            return call

    settings = config(llama("even").path, max_model_len=64, overlap="on")
    with Engine(settings, executor=Watched(settings)) as engine:
        engine.add([1, 2, 3], params(1, ignore_eos=True))
        calls.clear()
        engine.step()
        assert calls == ["submit", "choose", "collect", "submit"]
        engine.cancel(0)
        assert engine.has_work  # the step under way
        assert engine.step() == [] and not engine.has_work
        assert calls[4:] == ["choose", "collect"]
        engine.check_integrity()


def test_a_row_without_a_token_ends_alone(llama: Llama) -> None:
    """A NaN in one request's logits, while its next row is scheduled already."""

    class Poisoned:
        def __init__(self, settings: Any) -> None:
            self._inner, self.steps = make_executor(settings, discover()), 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def collect(self) -> list[StepResult]:
            (result,) = self._inner.collect()
            self.steps += 1
            if self.steps == 3:
                result.token_ids[0] = -1
            return [result]

    settings = config(llama("even").path, max_model_len=64, overlap="on")
    with Engine(settings, executor=Poisoned(settings)) as engine:
        run = drive(engine, [[1, 2, 3], [4, 5]], [params(1, ignore_eos=True), params(3, ignore_eos=True)], look=False)
    assert [request.finish_reason for request in run.requests] == ["error", "length"]
    assert [len(tokens) for tokens in run.tokens] == [2, 21]


def test_what_interrupts_a_step_leaves_nothing_for_the_next(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a step that was given up are not taken for those of the next one."""
    each = [params(i, ignore_eos=True) for i in range(2)]
    settings = config(llama("even").path, max_model_len=160, overlap="on", executor="process")
    with Engine(settings) as engine:
        calm = drive(engine, PROMPTS[:2], each, look=False).tokens
        requests = [engine.add(prompt, one, salt=b"2") for prompt, one in zip(PROMPTS, each, strict=False)]
        engine.step()
        with monkeypatch.context() as patched:
            patched.setattr(engine, "_schedule", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        while engine.has_work:
            engine.step()
        engine.check_integrity()
    assert [request.output for request in requests] == calm


def interrupted() -> None:
    raise KeyboardInterrupt


def test_an_engine_with_threads_may_be_closed_twice(llama: Llama) -> None:
    engine = Engine(config(llama("even").path, backend="numpy", max_model_len=64, overlap="on"))
    engine.add([1, 2, 3], params(0))
    engine.step()
    engine.close()
    engine.close()
    assert not engine.has_work
