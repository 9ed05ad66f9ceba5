"""The whole engine on the Neuron backend's stand-in: layouts by processes, nothing compiled once it has started, and as
many programs as the plan has said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.conftest import Checkpoint, Llama
from tests.integration.driving import config, drive, follow
from tests.integration.oracle import check_bfloat16, check_float32
from tests.integration.processes import lineshaft

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.errors import BackendUnavailable
from lineshaft.sampling.params import SamplingParams
from lineshaft.tokenizer import Tokenizer
from lineshaft_neuron import stand_in

LENGTHS = (1, 7, 16, 33)
TOKENS = 8
CRAMPED = {"max_model_len": 60, "cache.pages": 13, "cache.page_size": 5}
STAND_IN: dict[str, Any] = {
    "backend": "neuron", "backend_options.stand_in": True, "backend_options.prefill_buckets": [8, 16],
    "backend_options.decode_buckets": [1, 4],
}  # fmt: skip

LAYOUTS = [
    pytest.param("lone-kv", {"layout.tp": 2}, id="tp2-of-one-kv-head", marks=pytest.mark.full),
    pytest.param("even", {"layout.dp": 2, "layout.tp": 2}, id="dp2-tp2"),
]


def on_neuron(model: Path, **more: Any) -> EngineConfig:
    return config(model, **{**STAND_IN, **more})


def test_one_rank_agrees_with_the_oracle(llama: Llama) -> None:
    """Prompts longer than the largest bucket go in chunks, one prefill a step and none beside decodes."""
    checkpoint = llama("even")
    expected = [checkpoint.oracle.expect(prompt, TOKENS) for prompt in checkpoint.oracle.prompts(0, LENGTHS)]
    with Engine(on_neuron(checkpoint.path, **CRAMPED)) as engine:
        run = follow(engine, expected, arrivals=[0, 2, 2, 3])
        check_float32(expected, run.logits)
        assert run.mixed_steps == 0
        alone = follow(engine, expected[-1:])
        assert alone.steps - TOKENS == 2  # 33 tokens: two chunks of 16 before the one that gives a token


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_the_demo_model_agrees_with_the_oracle(smollm2: Checkpoint, dtype: str, request: pytest.FixtureRequest) -> None:
    ids = Tokenizer.from_checkpoint(smollm2.path).encode(", ".join(map(str, range(1, 60))))  # it is sure how to go on
    expected = [smollm2.oracle.expect(ids[20 * n : 20 * n + length], 12) for n, length in enumerate((8, 47))]
    few = {"max_model_len": 64, "cache.pages": 9, "cache.page_size": 16, "scheduler.max_rows": 2}
    tables = {"backend_options.prefill_buckets": [32], "backend_options.decode_buckets": [2]}
    with Engine(on_neuron(smollm2.path, dtype=dtype, **few, **tables)) as engine:
        got = follow(engine, expected).logits
    if dtype == "float32":
        check_float32(expected, got)
    else:
        check_bfloat16(expected, got, request.getfixturevalue("smollm2_bfloat16"), least_decided=0.9)


@pytest.mark.parametrize(("variant", "degrees"), LAYOUTS)
def test_a_layout_changes_nothing(llama: Llama, variant: str, degrees: dict[str, int]) -> None:
    """In dp x tp the ranks that meet are a part of all: a sum over all would be wrong."""
    checkpoint = llama(variant)
    expected = [checkpoint.oracle.expect(prompt, TOKENS) for prompt in checkpoint.oracle.prompts(0, LENGTHS)]
    with Engine(on_neuron(checkpoint.path, **CRAMPED, **degrees)) as engine:
        check_float32(expected, follow(engine, expected, arrivals=[0, 2, 2, 3]).logits)


def test_nothing_compiles_in_a_thousand_random_steps(llama: Llama) -> None:
    """Steps of every kind: chunks, decode, sampling, log-probabilities, shared prefixes, preemption, copied pages."""
    rng = np.random.default_rng(11)
    settings = {**CRAMPED, "max_logprobs": 2, "cache.pages": 20}
    with Engine(on_neuron(llama("even").path, **settings)) as engine:
        before = vars(stand_in.compiler().counts).copy()
        steps = 0
        while steps < 1000:
            prompts = [list(map(int, rng.integers(0, 3, rng.integers(1, 40)))) for _ in range(40)]
            params = [some_params(rng) for _ in prompts]
            arrivals = sorted(map(int, rng.integers(0, 60, len(prompts))))
            steps += drive(engine, prompts, params, arrivals=arrivals, salt=b"shared", look=False).steps
        metrics = engine.metrics()
        assert metrics.preemptions > 0 and metrics.prefix_hit_tokens > 0
        assert vars(stand_in.compiler().counts) == before
        assert before["recompiled"] == 0 and before["graph_breaks"] == 0


def some_params(rng: np.random.Generator) -> SamplingParams:
    hot = rng.random() < 0.5
    return SamplingParams(
        temperature=1.0 if hot else 0.0, seed=int(rng.integers(0, 99)), top_k=int(rng.integers(0, 9)),
        logprobs=2 if rng.random() < 0.3 else None, max_tokens=int(rng.integers(1, 20)), ignore_eos=True,
    )  # fmt: skip


def test_there_are_as_many_programs_as_the_plan_has_said(llama: Llama) -> None:
    with Engine(on_neuron(llama("even").path, **CRAMPED, max_logprobs=2)) as engine:
        made, notes = programs(engine), engine.plan.notes
        assert f"programs {len(made)}" in notes
        assert made[0].session.lane.counts.compiled == len(made) + 3  # that read, write and copy pages
        forwards = [program for program in made if program.shape.tokens]
        assert {(p.shape.tokens, p.shape.rows) for p in forwards} >= {(8, 1), (16, 1), (1, 1), (4, 4)}
        assert {program.shape for program in made} == set(engine.plan.shapes)
        assert any(note.startswith("lane compile: stand_in = true") for note in notes)


def programs(engine: Engine) -> Sequence[Any]:
    (worker,) = engine._executor._workers  # type: ignore[attr-defined]
    return list(worker._programs.values())


def test_without_a_device_it_does_not_run_on_the_cpu_unasked(llama: Llama) -> None:
    with pytest.raises(BackendUnavailable, match="stand_in"):
        Engine(config(llama("even").path, backend="neuron"))


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 3])
def test_the_demo_answers_once_the_backend_is_changed(ranks: int) -> None:
    """Two settings change the backend; the others only keep it to a few programs."""
    few = {"max_model_len": 64, "scheduler.max_rows": 1, "sampling_extras": "false", "layout.tp": ranks}
    done = lineshaft(
        "generate", "--config", "examples/demo.toml", "--backend", "neuron", "--backend-option", "stand_in=true",
        "--prompt", "What is the capital of France?", "--max-tokens", "12", "--temperature", "0",
        *(word for key, value in few.items() for word in ("--set", f"{key}={value}")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
