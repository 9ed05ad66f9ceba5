"""Random Llamas of odd sizes agree with transformers, however their steps are cut, preempted, shared and mixed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.integration.checkpoints import LLAMA3, ODD
from tests.integration.conftest import Checkpoint, Llama
from tests.integration.driving import config, drive, follow, greedy
from tests.integration.oracle import Expected, check_bfloat16, check_float32, float32_tolerance, undisputed

from lineshaft.engine import Engine

LENGTHS = (1, 7, 16, 33)
TOKENS = 12

ROOMY = {"max_model_len": 96, "cache.pages": 64, "cache.page_size": 16}
"""Holds all prompts at once, each prefilled in one step."""

CRAMPED = {"max_model_len": 60, "cache.pages": 13, "cache.page_size": 5, "scheduler.token_budget": 8}
"""One request's worth of pages, of a size that nothing divides, and steps shorter than most prompts."""

LANES = [(program, functional) for program in ("tape", "eager") for functional in (False, True)]


@pytest.fixture(scope="module", params=ODD)
def checkpoint(request: pytest.FixtureRequest, llama: Llama) -> Checkpoint:
    return llama(request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[Expected]:
    return expect(checkpoint)


@pytest.fixture(scope="module")
def roomy(checkpoint: Checkpoint) -> Iterator[Engine]:
    with Engine(config(checkpoint.path, overlap="off", **ROOMY)) as engine:
        yield engine


def expect(checkpoint: Checkpoint) -> list[Expected]:
    oracle = checkpoint.oracle
    return [oracle.expect(prompt, TOKENS) for prompt in oracle.prompts(0, LENGTHS)]


def test_whole_prompts(roomy: Engine, expected: list[Expected]) -> None:
    for item in expected:
        check_float32([item], follow(roomy, [item]).logits)


def test_a_batch_that_decodes_and_prefills_at_once(roomy: Engine, expected: list[Expected]) -> None:
    run = follow(roomy, expected, arrivals=[0, 3, 5, 6])
    assert run.mixed_steps > 0
    check_float32(expected, run.logits)


def test_a_prompt_whose_prefix_is_cached(roomy: Engine, expected: list[Expected]) -> None:
    first, again = (follow(roomy, expected[-1:], salt=b"shared prefix") for _ in range(2))
    assert first.requests[0].cached == 0
    assert again.requests[0].cached == 32  # of 33 tokens, the whole pages
    check_float32(expected[-1:], again.logits)


def test_the_tokens_are_the_oracles_without_being_led(roomy: Engine, expected: list[Expected]) -> None:
    run = drive(roomy, [item.prompt for item in expected], greedy(TOKENS), look=False)
    sure = undisputed(expected, float32_tolerance(expected))
    assert [tokens[: len(known)] for tokens, known in zip(run.tokens, sure, strict=True)] == sure
    assert sum(map(len, sure)) >= len(expected) * TOKENS * 0.9


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_chunked_and_preempted_prompts(checkpoint: Checkpoint, expected: list[Expected], prefix_caching: bool) -> None:
    settings = CRAMPED | {"overlap": "off", "cache.prefix_caching": prefix_caching}
    with Engine(config(checkpoint.path, **settings)) as engine:
        run = follow(engine, expected)
        assert engine.metrics().preemptions == run.preemptions > 0
    check_float32(expected, run.logits)


def test_bfloat16(checkpoint: Checkpoint, expected: list[Expected]) -> None:
    with Engine(config(checkpoint.path, dtype="bfloat16", **ROOMY)) as engine:
        run = follow(engine, expected, arrivals=[0, 3, 5, 6])
    check_bfloat16(expected, run.logits, checkpoint.oracle.bfloat16(), least_decided=0.2)


def test_many_requests_of_which_half_share_a_prefix(llama: Llama) -> None:
    checkpoint = llama("gqa8")
    prefix, *prompts = checkpoint.oracle.prompts(3, [17, *range(1, 41, 2)])
    prompts = [prefix + prompt if i % 2 else prompt for i, prompt in enumerate(prompts)]
    expected = [checkpoint.oracle.expect(prompt, TOKENS) for prompt in prompts]
    settings = {
        "max_model_len": 72,
        "cache.pages": 30,
        "cache.page_size": 4,
        "scheduler.token_budget": 24,
        "overlap": "off",
    }
    with Engine(config(checkpoint.path, **settings, **{"scheduler.max_rows": 6})) as engine:
        run = follow(engine, expected, arrivals=[i // 3 for i in range(len(prompts))])
    assert run.preemptions > 0
    assert run.mixed_steps > len(prompts)
    assert sum(request.cached >= 16 for request in run.requests) >= 5
    check_float32(expected, run.logits)


@pytest.mark.parametrize(("program", "functional"), LANES)
def test_every_way_to_run_a_program(llama: Llama, program: str, functional: bool) -> None:
    checkpoint = llama("gqa3-tied")
    expected = expect(checkpoint)
    options = {"overlap": "off", "backend_options.program": program, "backend_options.functional": functional}
    with Engine(config(checkpoint.path, **CRAMPED, **options)) as engine:
        run = follow(engine, expected)
        assert run.preemptions > 0
    check_float32(expected, run.logits)


def test_rope_scaling_is_beyond_the_original_context() -> None:
    """Else the case "llama3-rope" would show nothing about it."""
    assert max(LENGTHS) > LLAMA3["original_max_position_embeddings"]
