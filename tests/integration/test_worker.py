"""One rank on its own: what it says that it needs, and what it then takes."""

from __future__ import annotations

import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import config

from lineshaft.runner.worker import Worker


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
