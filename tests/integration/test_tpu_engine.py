"""The whole engine on the TPU backend, on virtual CPU devices: layouts in one program, nothing compiled once it has
started, and a second start that compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import TPU_ON_CPU, config, drive, follow, greedy
from tests.integration.oracle import check_float32

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.errors import BackendUnavailable, InvalidValue, LayoutError
from lineshaft.sampling.params import SamplingParams
from lineshaft_jax.devices import cpu_devices

LENGTHS = (1, 7, 16, 33)
TOKENS = 8
CRAMPED = {"max_model_len": 60, "cache.pages": 13, "cache.page_size": 5, "scheduler.token_budget": 16}

LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "tp8": ("eight", {"layout.tp": 8}),
    "tp2-of-one-kv-head": ("lone-kv", {"layout.tp": 2}),
    "dp2": ("even", {"layout.dp": 2}),
    "dp2-tp4": ("eight", {"layout.dp": 2, "layout.tp": 4}),
}


def on_tpu(model: Path, **more: Any) -> EngineConfig:
    return config(model, **{**TPU_ON_CPU, **more})


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The XLA compilations of this process while it lasts."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(llama: Llama, layout: str) -> None:
    variant, degrees = LAYOUTS[layout]
    checkpoint = llama(variant)
    expected = [checkpoint.oracle.expect(prompt, TOKENS) for prompt in checkpoint.oracle.prompts(0, LENGTHS)]
    prompts = [item.prompt for item in expected]
    with Engine(on_tpu(checkpoint.path, **CRAMPED, **degrees)) as engine:
        check_float32(expected, follow(engine, expected, arrivals=[0, 2, 2, 3]).logits)
        free = drive(engine, prompts, greedy(TOKENS), look=False)
    with Engine(on_tpu(checkpoint.path, **CRAMPED)) as engine:
        assert free.tokens == drive(engine, prompts, greedy(TOKENS), look=False).tokens


def test_nothing_compiles_in_a_thousand_random_steps(llama: Llama) -> None:
    """Steps of every kind: chunks, decode, sampling, log-probabilities, shared prefixes, preemption, copied pages."""
    rng = np.random.default_rng(11)
    settings = {**CRAMPED, "max_logprobs": 2, "cache.pages": 20}
    with Engine(on_tpu(llama("even").path, **settings)) as engine, compilations() as seen:
        steps = 0
        while steps < 1000:
            prompts = [list(map(int, rng.integers(0, 3, rng.integers(1, 40)))) for _ in range(40)]
            params = [some_params(rng) for _ in prompts]
            arrivals = sorted(map(int, rng.integers(0, 60, len(prompts))))
            run = drive(engine, prompts, params, arrivals=arrivals, salt=b"shared", look=False)
            steps += run.steps
        metrics = engine.metrics()
        assert metrics.preemptions > 0 and metrics.prefix_hit_tokens > 0
        assert seen == []
        jax.jit(lambda x: x + 1)(np.arange(3))  # what counts compilations does count
        assert seen


def some_params(rng: np.random.Generator) -> SamplingParams:
    hot = rng.random() < 0.5
    return SamplingParams(
        temperature=1.0 if hot else 0.0, seed=int(rng.integers(0, 99)), top_k=int(rng.integers(0, 9)),
        logprobs=2 if rng.random() < 0.3 else None, max_tokens=int(rng.integers(1, 20)), ignore_eos=True,
    )  # fmt: skip


def test_a_second_start_compiles_nothing(llama: Llama, tmp_path: Path) -> None:
    settings = {**CRAMPED, "backend_options.cache_dir": str(tmp_path / "programs")}
    tokens, made = [], []
    for _ in range(2):
        with Engine(on_tpu(llama("even").path, **settings)) as engine, compilations() as seen:
            tokens.append(drive(engine, [[1, 2, 3]], greedy(TOKENS), look=False).tokens)
            made.append([program.report.cached for program in programs(engine)])
        assert seen == []
    assert tokens[0] == tokens[1]
    assert not any(made[0]) and all(made[1])


def programs(engine: Engine) -> list[Any]:
    (worker,) = engine._executor._workers  # type: ignore[attr-defined]
    return list(worker._programs.values())


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_pallas_kernels_interpreted_change_nothing(llama: Llama, quantization: str) -> None:
    """In an engine, with chunks, mixed steps and preemption; products of 128 lanes exist in that variant alone."""
    checkpoint = llama("lanes")
    settings = {"max_model_len": 64, "cache.pages": 7, "cache.page_size": 16, "scheduler.token_budget": 16}
    settings["quantization"] = quantization
    tokens = []
    for interpret in (False, True):
        more = {"backend_options.interpret": interpret}
        with Engine(on_tpu(checkpoint.path, **settings, **more)) as engine:
            run = drive(engine, checkpoint.oracle.prompts(3, (5, 30, 40)), greedy(12), look=False)
            used = {entry.kernel for entry in engine.plan.entries}
        assert run.mixed_steps and run.preemptions
        assert ({"pallas_attend", "pallas_write_kv"} <= used) == interpret
        assert (f"pallas_linear_{quantization}" in used) == (interpret and quantization != "none")
        tokens.append(run.tokens)
    assert tokens[0] == tokens[1]


def test_without_a_tpu_it_does_not_run_on_the_cpu_unasked(llama: Llama) -> None:
    with pytest.raises(BackendUnavailable, match="platform"):
        Engine(config(llama("even").path, backend="tpu"))


def test_more_ranks_than_devices_are_refused(llama: Llama) -> None:
    cpu_devices(1)  # JAX starts here, if no test before has started it: with eight devices
    with pytest.raises(LayoutError, match="virtual devices"):
        Engine(on_tpu(llama("even").path, **CRAMPED, **{"layout.tp": 2, "layout.dp": 8}))


def test_a_folder_that_others_may_write_to_is_refused(llama: Llama, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidValue, match="others may write"):
        Engine(on_tpu(llama("even").path, **{"backend_options.cache_dir": str(tmp_path)}))
