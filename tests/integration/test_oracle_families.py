"""Random models of every dense family agree with transformers, in odd sizes, cut, preempted and on two workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.checkpoints import FAMILIES, LONGROPE
from tests.integration.conftest import Checkpoint, Llama
from tests.integration.driving import config, drive, follow, greedy
from tests.integration.gguf_files import convert
from tests.integration.oracle import Expected, check_bfloat16, check_float32, float32_tolerance, undisputed

from lineshaft.engine import Engine

LENGTHS = (1, 7, 16, 33)
TOKENS = 12
ONE_WORKER = [name for name in FAMILIES if not name.startswith("even-")]
TWO_WORKERS = [name for name in FAMILIES if name.startswith("even-")]

WINDOWED = ("mistral", "phi3")
"""All their layers have a window, and give back the pages that lie before it: they have room where others have not."""

CRAMPED = {"max_model_len": 60, "cache.pages": 13, "cache.page_size": 5, "scheduler.token_budget": 8}
"""One request's worth of pages, of a size that nothing divides, and steps shorter than most prompts."""
CRAMPED_WINDOW = CRAMPED | {"cache.pages": 8}
"""The same where no layer keeps more than its window."""


def expect(checkpoint: Checkpoint, lengths: tuple[int, ...] = LENGTHS, tokens: int = TOKENS) -> list[Expected]:
    return [checkpoint.oracle.expect(prompt, tokens) for prompt in checkpoint.oracle.prompts(0, lengths)]


@pytest.mark.parametrize("variant", [name for name in ONE_WORKER if "longrope" not in name])
def test_chunked_and_preempted_prompts(llama: Llama, variant: str) -> None:
    checkpoint = llama(variant)
    expected = expect(checkpoint)
    cramped = CRAMPED_WINDOW if variant in WINDOWED else CRAMPED
    with Engine(config(checkpoint.path, overlap="off", **cramped)) as engine:
        run = follow(engine, expected)
        free = drive(engine, [item.prompt for item in expected], greedy(TOKENS), look=False)
    assert run.preemptions > 0
    check_float32(expected, run.logits)
    sure = undisputed(expected, float32_tolerance(expected))
    assert [tokens[: len(known)] for tokens, known in zip(free.tokens, sure, strict=True)] == sure


@pytest.mark.parametrize("variant", TWO_WORKERS)
def test_two_workers(llama: Llama, variant: str) -> None:
    checkpoint = llama(variant)
    expected = expect(checkpoint, (5, 17), 4)
    with Engine(config(checkpoint.path, **CRAMPED, **{"layout.tp": 2})) as engine:
        run = follow(engine, expected)
    check_float32(expected, run.logits)


GGUF = ("llama-yarn", "mistral", "qwen2", "qwen3", "gemma3-gguf", "phi3", "phi3-longrope")


@pytest.mark.parametrize("variant", GGUF)
def test_gguf_files(llama: Llama, tmp_path: Path, variant: str) -> None:
    """The file's words for the config, the names of its tensors and what converters change in them."""
    checkpoint = llama(variant)
    path = convert(checkpoint.path, tmp_path / f"{variant}.gguf")
    expected = expect(checkpoint, (9, 30), 6)
    with Engine(config(path, max_model_len=60, **{"cache.page_size": 8})) as engine:
        run = follow(engine, expected)
    check_float32(expected, run.logits)


@pytest.mark.parametrize("variant", ["gemma3", "phi3"])
def test_bfloat16(llama: Llama, variant: str) -> None:
    checkpoint = llama(variant)
    expected = expect(checkpoint)
    with Engine(config(checkpoint.path, dtype="bfloat16", max_model_len=96)) as engine:
        run = follow(engine, expected, arrivals=[0, 3, 5, 6])
    check_bfloat16(expected, run.logits, checkpoint.oracle.bfloat16(), least_decided=0.2)


@pytest.mark.parametrize(("longest", "lengths", "tokens"), [(8, (1, 4), 4), (60, (9, 20), 8)], ids=["short", "long"])
def test_longrope_is_chosen_by_the_longest_text_allowed(
    llama: Llama, longest: int, lengths: tuple[int, ...], tokens: int
) -> None:
    """Texts of one run stay on one side of the original context of 8 tokens, where transformers has one list too."""
    checkpoint = llama("phi3-longrope")
    expected = expect(checkpoint, lengths, tokens)
    with Engine(config(checkpoint.path, max_model_len=longest, **{"cache.page_size": 4})) as engine:
        run = follow(engine, expected)
    check_float32(expected, run.logits)
    assert LONGROPE["short_factor"] != LONGROPE["long_factor"]
