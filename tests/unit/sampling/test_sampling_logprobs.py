"""Log-probabilities of a prompt are put together from chunks, whatever their size, and from repeated ones."""

from __future__ import annotations

import numpy as np
import pytest

from lineshaft.sampling.logprobs import Logprobs, PromptLogprobs
from lineshaft_contract.ops.logits import logprobs
from lineshaft_contract.problems import SampleProblem

PROMPT, VOCAB, TOP = [4, 1, 7, 7, 2, 0, 9], 12, 3
LOGITS = np.random.default_rng(0).standard_normal((len(PROMPT), VOCAB))


def found(gathered: PromptLogprobs, start: int, count: int, before: int) -> Logprobs:
    """What a step gives that has `before` rows of others in front."""
    ids = np.concatenate([np.zeros(before, np.int32), gathered.ids(start, count)])
    rows = np.concatenate([np.zeros((before, VOCAB)), LOGITS[start : start + count]])
    return Logprobs(*logprobs(SampleProblem(dtype="float64", rows=len(rows), vocab=VOCAB), rows, ids, TOP))


@pytest.mark.parametrize("chunks", [(7,), (1, 1, 1, 1, 1, 1, 1), (3, 4), (5, 2), (4, 4, 3)])
def test_chunks_of_any_size_give_the_same(chunks: tuple[int, ...]) -> None:
    gathered = PromptLogprobs(PROMPT, 2)
    assert not gathered.complete
    start = 0
    for i, count in enumerate(chunks):
        if chunks == (4, 4, 3) and i == 1:
            start = 0  # a preemption: computed again
        gathered.add(start, count, found(gathered, start, count, before=i), row=i)
        start += count
    assert gathered.complete
    first, *rest = gathered.result
    assert first is None
    logs = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    for at, entry in enumerate(rest):
        assert entry is not None
        token, order = PROMPT[at + 1], np.argsort(-logs[at])
        assert set(entry) == {token, *map(int, order[:2])}
        assert entry[token][0] == pytest.approx(logs[at, token])
        ranks = {int(t): rank + 1 for rank, t in enumerate(order[:TOP])}
        assert {t: rank for t, (_, rank) in entry.items()} == {t: ranks.get(t, 0) for t in entry}


def test_ids_are_the_tokens_that_come_next() -> None:
    gathered = PromptLogprobs(PROMPT, 0)
    assert gathered.ids(0, 3).tolist() == [1, 7, 7]
    assert gathered.ids(4, 3).tolist() == [0, 9, -1]


def test_a_prompt_of_one_token_needs_nothing() -> None:
    assert PromptLogprobs([5], 1).complete and PromptLogprobs([5], 1).result == [None]
