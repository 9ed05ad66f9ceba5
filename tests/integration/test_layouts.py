"""Workers in processes: the same logits at every layout, equal plans, and no worker that outlives what it works for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.conftest import Checkpoint, Llama
from tests.integration.driving import config, drive, follow, greedy
from tests.integration.oracle import check_float32
from tests.integration.processes import SECONDS, Watch, environment, folders_of, start

from lineshaft.engine import Engine
from lineshaft.errors import PlanMismatch, SessionPoisoned, WorkerDied
from lineshaft.executors import agree
from lineshaft.executors.wire import receive, send
from lineshaft.runner.worker import Worker
from lineshaft.sampling.params import SamplingParams

LENGTHS = (1, 7, 16, 33)
TOKENS = 8
CRAMPED = {"max_model_len": 60, "cache.pages": 13, "cache.page_size": 5, "scheduler.token_budget": 16}

LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "tp2": ("even", {"layout.tp": 2}),
    "tp2-of-one-kv-head": ("lone-kv", {"layout.tp": 2}),
    "dp2": ("even", {"layout.dp": 2}),
    "dp2-tp2": ("even", {"layout.dp": 2, "layout.tp": 2}),
}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the executor puts its files during the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def pair(llama: Llama, temporary: Path) -> Iterator[Engine]:
    """Two workers with a long request under way."""
    with Engine(config(llama("even").path, **{"layout.tp": 2, "max_model_len": 250})) as engine:
        engine.add([1, 2, 3], greedy(200))
        for _ in range(3):
            assert engine.step()
        yield engine


def test_the_process_executor_can_run_one_worker(llama: Llama) -> None:
    checkpoint = llama("even")
    prompts = checkpoint.oracle.prompts(0, LENGTHS)
    tokens = []
    for executor in ("process", "inproc"):
        with Engine(config(checkpoint.path, executor=executor, **CRAMPED)) as engine:
            tokens.append(drive(engine, prompts, greedy(TOKENS)).tokens)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(llama: Llama, temporary: Path, layout: str) -> None:
    variant, degrees = LAYOUTS[layout]
    checkpoint = llama(variant)
    expected = [checkpoint.oracle.expect(prompt, TOKENS) for prompt in checkpoint.oracle.prompts(0, LENGTHS)]
    prompts = [item.prompt for item in expected]
    with Engine(config(checkpoint.path, **CRAMPED, **degrees)) as engine, Watch.children() as workers:
        assert len(workers.pids) == degrees.get("layout.dp", 1) * degrees.get("layout.tp", 1)
        run = follow(engine, expected, arrivals=[0, 2, 2, 3])
        free = drive(engine, prompts, greedy(TOKENS), look=False)
        engine.close()
        assert workers.all_end(0)
    assert folders_of(temporary) == []
    check_float32(expected, run.logits)
    with Engine(config(checkpoint.path, **CRAMPED)) as engine:
        assert free.tokens == drive(engine, prompts, greedy(TOKENS), look=False).tokens


def test_replicas_share_the_work(llama: Llama) -> None:
    with Engine(config(llama("even").path, **CRAMPED, **{"layout.dp": 2})) as engine:
        for length in (3, 4):  # with the token in flight, a page of 5 holds them
            engine.add([1] * length, greedy(TOKENS))
        assert len(engine.step()) == 2
        assert [replica.cache.used_pages() for replica in engine._replicas] == [1, 1]


def test_the_real_model_on_three_workers(smollm2: Checkpoint) -> None:
    expected = [smollm2.oracle.expect(prompt, TOKENS) for prompt in smollm2.oracle.prompts(12, (5, 40))]
    settings: dict[str, Any] = {"max_model_len": 64, "cache.pages": 12, "scheduler.max_rows": 2}
    with Engine(config(smollm2.path, **settings, **{"layout.tp": 3})) as engine:
        run = follow(engine, expected)
    check_float32(expected, run.logits)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_dies_is_an_error_soon(pair: Engine, temporary: Path, rank: int) -> None:
    with Watch.children() as workers:
        assert len(workers.pids) == 2
        os.kill(workers.pids[rank], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match="rank"):
            while pair.has_work:
                pair.step()
        assert time.monotonic() - began < 10
        pair.close()
        assert workers.all_end(0)
    assert folders_of(temporary) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_hangs_in_a_step_ends_them_all(llama: Llama, temporary: Path, rank: int) -> None:
    settings = config(llama("even").path, **CRAMPED, **{"layout.dp": 2, "step_timeout_s": 1})
    with Engine(settings) as engine, Watch.children() as workers:
        assert folders_of(temporary) == []  # they met; nothing is left to lose
        for _ in range(2):
            engine.add([1, 2, 3], greedy(20))
        assert engine.step()
        os.kill(workers.pids[rank], signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match=rf"step_timeout_s = 1 from rank {rank} \(process {workers.pids[rank]}\);"):
            engine.step()
        assert 1 <= time.monotonic() - began < 10
        assert workers.all_end(0)
        with pytest.raises(SessionPoisoned):
            engine.step()


def test_a_worker_that_stops_reading_is_not_waited_for(temporary: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.1)
    with ours, theirs:
        with pytest.raises(TimeoutError):
            send(ours, {}, [np.zeros(1 << 22, np.uint8)])
        theirs.sendall(b"\1")
        with pytest.raises(TimeoutError):
            receive(ours)


def test_an_interrupted_step_poisons_the_engine(pair: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of the step are still under way: the next step must not take them for its own."""
    executor = pair._executor

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    pair.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=4))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(executor, "_collect", interrupt)
        pair.step()
    with pytest.raises(SessionPoisoned, match="make the engine anew"):
        pair.step()


def test_closing_does_not_wait_for_a_worker_that_hangs(pair: Engine, temporary: Path) -> None:
    with Watch.children() as workers:
        os.kill(workers.pids[0], signal.SIGSTOP)
        began = time.monotonic()
        pair.close()
        assert time.monotonic() - began < 10
        assert workers.all_end(0)
    assert folders_of(temporary) == []


@pytest.mark.parametrize("hanging", [False, True], ids=["", "while-one-waits-for-the-other"])
def test_an_engine_that_is_killed_leaves_no_worker(even_chat: Path, tmp_path: Path, hanging: bool) -> None:
    """The engine cannot tell them, and a worker in a collective does not listen: the pipe that breaks ends them."""
    process = start(
        "generate", "--model", str(even_chat), "--backend", "cpu", "--tp", "2", "--raw", "--prompt", "x",
        "--max-tokens", "10000", "--ignore-eos", "--set", "max_logprobs=0", "--set", "scheduler.max_rows=1",
        env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        with Watch.children(process.pid) as workers:
            assert len(workers.pids) == 2
            if hanging:
                os.kill(workers.pids[1], signal.SIGSTOP)
            process.kill()
            with Watch(workers.pids[:1]) as waiting:
                assert waiting.all_end(10)
            if hanging:
                os.kill(workers.pids[1], signal.SIGCONT)
            assert workers.all_end(10)
        assert process.wait(SECONDS) == -signal.SIGKILL
    assert folders_of(tmp_path) == []


def test_an_engine_that_is_killed_before_its_workers_met_leaves_no_folder(even_chat: Path, tmp_path: Path) -> None:
    code = f"""
import signal
from lineshaft.config import make_config
from lineshaft.executors import make_executor
from lineshaft.registry import discover
settings = {{"model": {str(even_chat)!r}, "backend": "cpu", "layout.tp": 2}}
executor = make_executor(make_config(**settings), discover())
print("made", flush=True)
signal.pause()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment(TMPDIR=str(tmp_path)), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        assert len(folders_of(tmp_path)) == 1
        with Watch.children(process.pid) as workers:
            process.kill()
            assert workers.all_end(10)
    assert folders_of(tmp_path) == []


def test_unequal_plans_are_refused(llama: Llama) -> None:
    """Two ranks of which one was told to take another kernel, as if it had another version of a plugin."""
    here = sizes(llama, {})
    entry = next(e for e in here.plan.entries if any("priority" in r.reason for r in e.rejected))
    other = next(r.kernel for r in entry.rejected if "priority" in r.reason)
    there = sizes(llama, {f"kernels.{entry.op}": other})
    assert agree([here, replace(sizes(llama, {}), pages=(7,))]) == (7,)
    with pytest.raises(PlanMismatch, match=f"rank 0: {here.plan.hash[:16]}, rank 1: {there.plan.hash[:16]}"):
        agree([here, there])


def sizes(llama: Llama, more: dict[str, Any]) -> Any:
    worker = Worker(config(llama("even").path, **CRAMPED, **more))
    try:
        return worker.size()
    finally:
        worker.close()
