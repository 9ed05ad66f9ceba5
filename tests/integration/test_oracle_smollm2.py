"""SmolLM2 from its GGUF file agrees with transformers on the same file, on each backend that runs here, in float32 and
in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.integration.conftest import Checkpoint
from tests.integration.driving import BACKENDS, config, drive, follow, greedy
from tests.integration.oracle import (
    Array,
    Expected,
    Oracle,
    bfloat16_tolerance,
    check_bfloat16,
    check_float32,
    float32_tolerance,
    undisputed,
)

from lineshaft.engine import Engine
from lineshaft.tokenizer import Tokenizer

Check = Callable[[list[Expected], list[Array]], None]
LENGTHS = (8, 15, 30, 47, 75, 150)
TOKENS = 16
COUNT = ", ".join(map(str, range(1, 200)))
"""A text whose continuation the model is sure of, so that an equal argmax says something in bfloat16 too."""

CRAMPED = {"max_model_len": 192, "cache.pages": 13, "cache.page_size": 16}
"""One request's worth of pages; steps of 64 tokens are shorter than the longest prompt."""


@pytest.fixture(scope="module")
def expected(smollm2: Checkpoint) -> list[Expected]:
    ids = Tokenizer.from_checkpoint(smollm2.path).encode(COUNT)
    starts = [20 * n for n in range(len(LENGTHS))]  # no prompt is the prefix of another
    return [smollm2.oracle.expect(ids[at : at + n], TOKENS) for at, n in zip(starts, LENGTHS, strict=True)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=BACKENDS)
def engine(smollm2: Checkpoint, dtype: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(config(smollm2.path, dtype=dtype, **CRAMPED, **BACKENDS[request.param])) as engine:
        yield engine


@pytest.fixture
def check(dtype: str, smollm2_bfloat16: Oracle) -> Check:
    if dtype == "float32":
        return check_float32
    return lambda expected, got: check_bfloat16(expected, got, smollm2_bfloat16, least_decided=0.9)


def test_prompts_one_by_one(engine: Engine, expected: list[Expected], check: Check) -> None:
    runs = [follow(engine, [item]) for item in expected]
    assert [run.steps - TOKENS for run in runs] == [0, 0, 0, 0, 1, 2]  # further chunks that the long prompts take
    check(expected, [run.logits[0] for run in runs])


def test_a_batch_that_is_mixed_and_preempted(engine: Engine, expected: list[Expected], check: Check) -> None:
    several = expected[1:-1]  # they fit together at first, but not with all their output
    run = follow(engine, several)
    assert run.mixed_steps > 0
    assert run.preemptions > 0
    check(several, run.logits)


def test_a_prompt_whose_prefix_is_cached(engine: Engine, expected: list[Expected], check: Check) -> None:
    for cached in (0, 144):
        run = follow(engine, expected[-1:], salt=b"shared prefix")
        assert run.requests[0].cached == cached
        check(expected[-1:], run.logits)


def test_the_tokens_are_the_oracles_without_being_led(
    engine: Engine, expected: list[Expected], dtype: str, smollm2_bfloat16: Oracle
) -> None:
    run = drive(engine, [item.prompt for item in expected], greedy(TOKENS), look=False)
    exact = dtype == "float32"
    tolerance = float32_tolerance(expected) if exact else bfloat16_tolerance(expected, smollm2_bfloat16)
    sure = undisputed(expected, tolerance)
    print(f"{dtype}: {[len(known) for known in sure]} of {TOKENS} tokens before the oracle is not sure")
    assert [tokens[: len(known)] for tokens, known in zip(run.tokens, sure, strict=True)] == sure
    assert sum(map(len, sure)) >= len(expected) * TOKENS * 0.9
