"""The whole engine on cuda and rocm without a GPU: kernels in Triton's interpreter, graphs of a fake device, ranks over
gloo. It gives the tokens that the CPU backend gives. Each engine has processes of its own, where Triton interprets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import config, drive, greedy

from lineshaft.config import EngineConfig
from lineshaft.engine import Engine
from lineshaft.errors import BackendUnavailable, InvalidValue

SMALL: dict[str, Any] = {
    "max_model_len": 48, "cache.pages": 24, "cache.page_size": 8, "scheduler.token_budget": 16, "scheduler.max_rows": 2,
}  # fmt: skip
CRAMPED = {**SMALL, "cache.pages": 7}
PORTABLE = {"kernels.linear": "torch_linear", "kernels.attend": "torch_attend"}
"""The kernels that take longest in the interpreter, by torch instead."""


def on_gpu(model: Path, backend: str = "cuda", **more: Any) -> EngineConfig:
    return config(model, backend=backend, executor="process", **{"backend_options.interpret": True, **SMALL, **more})


def test_every_triton_kernel_in_a_step_of_each_kind(llama: Llama) -> None:
    checkpoint = llama("even")
    prompts = checkpoint.oracle.prompts(3, (3, 12))
    with Engine(config(checkpoint.path, overlap="off", **SMALL)) as engine:
        expected = drive(engine, prompts, greedy(2), arrivals=[0, 1], look=False)
    with Engine(on_gpu(checkpoint.path)) as engine:
        run = drive(engine, prompts, greedy(2), arrivals=[0, 1], look=False)
        used = {entry.kernel for entry in engine.plan.entries}
        assert "backend option interpret = True" in engine.plan.summary()
    assert expected.mixed_steps
    assert run.tokens == expected.tokens
    assert {"triton_attend_decode", "triton_attend_chunk", "triton_linear_few", "triton_rms_norm"} <= used


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "graph": ("cuda", {}),
    "piecewise-rocm": ("rocm", {"backend_options.program": "piecewise", "backend_options.target": "gfx1100"}),
    "eager": ("cuda", {"backend_options.program": "eager"}),
    "tp2": ("cuda", {"layout.tp": 2}),
    "tp2-beside-rocm": ("rocm", {"layout.tp": 2, "backend_options.overlap_communication": True}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_way_to_run_changes_nothing(llama: Llama, run: str) -> None:
    """With chunks, preemption, and prompts that share a beginning."""
    backend, more = RUNS[run]
    checkpoint = llama("even")
    first, second = checkpoint.oracle.prompts(5, (18, 20))
    batches = ([first, second], [first[:16] + second[:9], first])
    tokens = []
    on_cpu = config(checkpoint.path, **CRAMPED)
    for settings in (on_cpu, on_gpu(checkpoint.path, backend, **CRAMPED, **PORTABLE, **more)):
        with Engine(settings) as engine:
            runs = [drive(engine, prompts, greedy(12), salt=b"shared", look=False) for prompts in batches]
            assert engine.metrics().prefix_hit_tokens > 0 and runs[0].preemptions
        tokens.append([run.tokens for run in runs])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("program", ["eager", "tape"])
def test_the_host_takes_some_of_the_time_of_a_step_and_the_kernels_no_more_than_all(llama: Llama, program: str) -> None:
    checkpoint = llama("even")
    settings = on_gpu(checkpoint.path, **PORTABLE, **{"backend_options.program": program, "overlap": "off"})
    with Engine(settings) as engine:
        drive(engine, checkpoint.oracle.prompts(3, (3,)), greedy(2), look=False)  # one step of decode, the last
        assert engine.metrics().host_ms_per_decode_step > 0


def test_without_a_gpu_it_does_not_run_unasked(llama: Llama) -> None:
    for backend in ("cuda", "rocm"):
        with pytest.raises(BackendUnavailable, match="interpret = true"):
            Engine(config(llama("even").path, backend=backend))


def test_what_it_does_not_compute_in_is_refused(llama: Llama) -> None:
    with pytest.raises(InvalidValue, match="float64"):
        Engine(on_gpu(llama("even").path, dtype="float64"))
