"""One rank on its own: what it says that it needs, and what it then takes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import config, drive, greedy

from lineshaft.engine import Engine
from lineshaft.errors import SessionClosed
from lineshaft.executors.inproc import InprocExecutor
from lineshaft.registry import discover
from lineshaft.runner.messages import StepMessage
from lineshaft.runner.worker import Worker
from lineshaft_contract.backends import World
from lineshaft_contract.reference.backend import ReferenceBackend, ReferenceOptions, create


@pytest.mark.parametrize("budget", [64, 1024])
def test_a_step_takes_no_more_than_was_counted(llama: Llama, budget: int) -> None:
    """Results are counted as the forward holds them; a tape, which frees each after its last use, takes less."""
    worker = Worker(config(llama("even").path, **{"scheduler.token_budget": budget, "scheduler.max_rows": 16}))
    try:
        sizes = worker.size()
        taken = worker.start(sizes.pages).arena_bytes
    finally:
        worker.close()
    assert taken <= sizes.plan.workspace_bytes <= 3 * taken


def test_a_budget_beyond_what_requests_can_use_is_cut(llama: Llama) -> None:
    worker = Worker(config(llama("even").path, **{"scheduler.token_budget": 10**9, "scheduler.max_rows": 2}))
    try:
        limits = worker.size().limits
    finally:
        worker.close()
    assert limits.token_budget == 2 * limits.max_model_len


def test_a_backend_may_be_started_in_another_way(llama: Llama) -> None:
    worlds: list[World] = []

    def start(world: World) -> ReferenceBackend:
        worlds.append(world)
        return create(ReferenceOptions(), world)

    worker = Worker(config(llama("even").path, backend="numpy"), start=start)
    (world,) = worlds
    assert (world.size, world.threads) == (1, 1) and isinstance(worker.setup.backend, ReferenceBackend)


def test_the_session_is_there_from_start_to_close(llama: Llama) -> None:
    worker = Worker(config(llama("even").path, backend="numpy", max_model_len=64))
    with pytest.raises(SessionClosed, match="start it first"):
        _ = worker.session
    worker.start(worker.size().pages)
    assert worker.session.read_pages(0, [0])["k"].shape[0] == 1
    worker.close()
    with pytest.raises(SessionClosed):
        _ = worker.session


def test_an_engine_runs_on_the_executor_that_it_is_given(llama: Llama) -> None:
    seen: list[StepMessage] = []
    closed: list[bool] = []

    class Watching(InprocExecutor):
        def submit(self, steps: Sequence[StepMessage]) -> None:
            seen.extend(steps)
            super().submit(steps)

        def close(self) -> None:
            closed.append(True)
            super().close()

    settings = config(llama("even").path, backend="numpy", max_model_len=64)
    with Engine(settings, executor=Watching(settings, discover())) as engine:
        run = drive(engine, [[1, 2, 3]], greedy(4))
        (cache,) = engine.caches
        assert cache.used_pages() == 0
    assert len(seen) == run.steps == 4 and closed
