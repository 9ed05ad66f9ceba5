"""Penalties, biases and bans equal transformers' logits processors on random logits, at every step of an output."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import generation

from lineshaft.errors import InvalidSamplingParams, TokenOutOfRange
from lineshaft.sampling import SamplingParams, Structured
from lineshaft.sampling.choice import Choice, make_choice, mask_of
from lineshaft.sampling.pack import EDITS, pack_adjust

Adjust = Callable[[Sequence[Choice | None], Any], Any]
VOCAB, EOS = 97, frozenset({3, 5})
BAD_WORDS = ((7,), (11, 12), (20, 21, 22), (11, 13))


CASES: dict[str, tuple[dict[str, Any], Callable[[int], Any]]] = {
    "repetition": ({"repetition_penalty": 1.3}, lambda n: generation.RepetitionPenaltyLogitsProcessor(1.3)),
    "repetition below 1": ({"repetition_penalty": 0.7}, lambda n: generation.RepetitionPenaltyLogitsProcessor(0.7)),
    "min_tokens": (
        {"min_tokens": 9, "max_tokens": 30, "stop_token_ids": [8]},
        lambda n: generation.MinNewTokensLengthLogitsProcessor(n, 9, [3, 5, 8]),
    ),
    "bad_words": (
        {"bad_words": BAD_WORDS},
        lambda n: generation.NoBadWordsLogitsProcessor([list(word) for word in BAD_WORDS], eos_token_id=96),
    ),
    "logit_bias": (
        {"logit_bias": {4: 2.5, 40: -100.0}},
        lambda n: generation.SequenceBiasLogitsProcessor({(4,): 2.5, (40,): -100.0}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_transformers_at_every_step(name: str, adjust: Adjust) -> None:
    settings, oracle = CASES[name]
    rng = np.random.default_rng(len(name))
    prompt = [int(t) for t in rng.integers(0, 30, 15)]
    choice = make_choice(SamplingParams(**settings), prompt, VOCAB, EOS)
    assert choice is not None
    tokens, changed = list(prompt), 0
    for _ in range(25):
        logits = rng.standard_normal((1, VOCAB)).astype(np.float32) * 3
        expected = oracle(len(prompt))(torch.tensor([tokens]), torch.from_numpy(logits)).numpy()
        got = adjust([choice], logits)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        changed += not np.array_equal(got, logits)
        tokens.append(int(rng.choice([*range(7, 23), 50])))
        assert not choice.token(tokens[-1])
    assert changed > 3


def test_presence_and_frequency_count_the_output_alone(adjust: Adjust) -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 1.0, 1: -2.0})
    choice, counts = make_choice(params, [9, 9, 9, 10], VOCAB), Counter[int]()
    assert choice is not None
    for token in (9, 11, 9, 12, 9):
        choice.token(token)
        counts[token] += 1
        expected = np.zeros(VOCAB)
        for seen, count in counts.items():
            expected[seen] -= 0.5 + 0.25 * count
        expected[9] += 1.0
        expected[1] -= 2.0
        np.testing.assert_allclose(adjust([choice], np.zeros((1, VOCAB)))[0], expected)


def test_scale_comes_before_bias_and_a_ban_wins(adjust: Adjust) -> None:
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, logit_bias={2: 3.0, 3: 9.0}, min_tokens=5, bad_words=[[2, 6]]
    )
    choice = make_choice(params, [1], VOCAB, EOS)
    assert choice is not None
    choice.token(2)
    got = adjust([choice], np.full((1, VOCAB), 4.0))[0]
    assert got[[1, 2, 3, 5, 6, 7]].tolist() == [2.0, 4.0 / 2 - 0.5 + 3.0, -math.inf, -math.inf, -math.inf, 4.0]


def test_a_row_with_more_edits_than_a_program_holds_loses_none(adjust: Adjust) -> None:
    vocab = 3 * EDITS[-1]
    prompt = list(range(vocab - 100))
    choice = make_choice(SamplingParams(repetition_penalty=2.0), prompt, vocab)
    few = make_choice(SamplingParams(logit_bias={0: 1.0}), [1], vocab)
    steps = pack_adjust([few, None, choice], 4, vocab)
    assert [host["edit_ids"].shape for host in steps] == [(4, EDITS[-1])] * 3
    got = adjust([few, None, choice], np.full((4, vocab), 8.0))
    assert (got[2, : len(prompt)] == 4).all() and (got[2, len(prompt) :] == 8).all()
    assert got[0, 0] == 9 and (got[0, 1:] == 8).all() and (got[[1, 3]] == 8).all()


def test_a_step_takes_the_smallest_program_and_ships_no_dense_rows() -> None:
    choice = make_choice(SamplingParams(repetition_penalty=2.0), list(range(30)), 128_000)
    [host] = pack_adjust([choice], 8, 128_000)
    assert host["edit_ids"].shape == (8, EDITS[0])
    assert host.layout.nbytes == 8 * EDITS[0] * 12


def test_nothing_is_packed_for_rows_without_edits() -> None:
    assert make_choice(SamplingParams(temperature=0.5, top_k=3, typical_p=0.5), [1], VOCAB) is None
    early = make_choice(SamplingParams(min_tokens=2), [1], VOCAB, EOS)
    assert early is not None
    assert [len(pack_adjust([None, early], 2, VOCAB)) for _ in range(3) if not early.token(1)] == [1, 0, 0]


def test_allowed_token_ids_mask_their_row_alone(adjust: Adjust) -> None:
    choice = make_choice(SamplingParams(allowed_token_ids=[96, 0, 33]), [1], VOCAB)
    got = adjust([None, choice], np.zeros((3, VOCAB)))
    assert np.flatnonzero(got[1] == 0).tolist() == [0, 33, 96]
    assert (got[[0, 2]] == 0).all()
    assert np.flatnonzero(np.unpackbits(mask_of([31, 32], 40).view(np.uint8), bitorder="little")).tolist() == [31, 32]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logit_bias": {VOCAB: 1.0}}, TokenOutOfRange, "logit_bias names token 97"),
    ({"allowed_token_ids": [5, VOCAB]}, TokenOutOfRange, "allowed_token_ids names token 97"),
    ({"bad_words": [[5, VOCAB]]}, TokenOutOfRange, "bad_words names token 97"),
    ({"bad_words": ["no"]}, InvalidSamplingParams, "bad_words with the text 'no'"),
    ({"structured": Structured(regex="a")}, InvalidSamplingParams, "structured: this engine runs on token ids alone"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED)
def test_what_the_vocabulary_does_not_have_is_refused(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_choice(SamplingParams(**settings), [1], VOCAB)


def test_bad_words_are_spelled_at_the_start_and_after_a_space(vocabulary: Any, adjust: Adjust) -> None:
    tokenizer = vocabulary._tokenizer
    choice = make_choice(SamplingParams(bad_words=["Paris"]), [1], 49152, vocabulary=vocabulary)
    got = adjust([choice], np.zeros((1, 49152)))
    banned = {tokenizer.decode([int(token)]) for token in np.flatnonzero(np.isneginf(got[0]))}
    spelled = [tokenizer.encode(text, add_special=False) for text in ("Paris", " Paris")]
    assert banned == {tokenizer.decode(ids) for ids in spelled if len(ids) == 1}
    assert " Paris" in banned
