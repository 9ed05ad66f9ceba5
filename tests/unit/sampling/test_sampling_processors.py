"""Logits processors see a request's tokens and change its row alone; one that fails ends its own request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lineshaft.sampling import SamplingParams
from lineshaft.sampling.draw import PURPOSE_SAMPLE, draws
from lineshaft.sampling.logprobs import Logprobs
from lineshaft.sampling.processors import ProcessedRow, choose_processed
from lineshaft_contract.ops.logits import logprobs
from lineshaft_contract.problems import SampleProblem

LOGITS = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 9.0]], np.float32)
IDS = np.array([1, 0, 3], np.int32)


def ban(token: int) -> Any:
    def processor(output: Sequence[int], prompt: Sequence[int], logits: Any) -> Any:
        logits[token] = -np.inf
        return logits

    return processor


def row(r: int, *processors: Any, **settings: Any) -> ProcessedRow:
    params = SamplingParams(**{"temperature": 0, "logits_processors": list(processors), **settings})
    return ProcessedRow(r, params, 0, 5, prompt=(1, 2, 3), output=[4, 5])


def test_a_ban_changes_its_own_row_and_its_log_probabilities() -> None:
    problem = SampleProblem(dtype="float32", rows=3, vocab=4, top=2)
    before = Logprobs(*logprobs(problem, LOGITS, IDS, 2))
    ids, found = choose_processed([row(1, ban(0), ban(3))], LOGITS, IDS, before)
    assert ids.tolist() == [1, 2, 3] and found is not None
    assert found.top_ids.tolist() == [[1, 3], [2, 1], [3, 0]]
    assert found.chosen[1] == pytest.approx(-np.log(1 + np.exp(-1)))
    assert found.chosen[0] == before.chosen[0] and LOGITS[1, 0] == 5.0


def test_processors_run_in_order_and_see_the_tokens() -> None:
    seen: list[Any] = []

    def look(output: Sequence[int], prompt: Sequence[int], logits: Any) -> Any:
        seen.append((list(output), list(prompt), np.isneginf(logits[1])))
        return logits

    choose_processed([row(0, look, ban(1), look)], LOGITS, IDS, None)
    assert seen == [([4, 5], [1, 2, 3], False), ([4, 5], [1, 2, 3], True)]


def test_a_processor_that_changes_nothing_samples_as_the_op_does() -> None:
    own = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    each = row(0, lambda output, prompt, logits: logits, temperature=1.0, seed=9)
    ids, _ = choose_processed([each], own, np.array([0], np.int32), None)
    shares = np.exp(own[0]) / np.exp(own[0]).sum()
    assert ids[0] == np.searchsorted(np.cumsum(shares), draws([9], [0], [5], PURPOSE_SAMPLE, 0)[0])


def boom(output: Any, prompt: Any, logits: Any) -> Any:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    "processor", [boom, lambda o, p, x: x[:2], lambda o, p, x: x + np.inf, lambda o, p, x: None, lambda o, p, x: "a"]
)
def test_a_processor_that_fails_gives_no_token_to_its_own_row(processor: Any, caplog: Any) -> None:
    with caplog.at_level(logging.ERROR):
        ids, _ = choose_processed([row(0, processor)], LOGITS, IDS, None)
    assert ids.tolist() == [-1, 0, 3]
    assert "a logits processor failed" in caplog.text
