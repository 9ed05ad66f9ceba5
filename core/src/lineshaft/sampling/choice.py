"""What one request remembers while its tokens are chosen: penalties, biases, bans and its place in a grammar.

Knows no batch: `pack` puts the rows of a step together.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from lineshaft.errors import InvalidSamplingParams, TokenOutOfRange
from lineshaft.sampling.params import SamplingParams
from lineshaft.sampling.vocabulary import Grammar, Vocabulary
from lineshaft_contract.sessions import HostArray

Edits = tuple[HostArray, HostArray, HostArray]
"""Of one row: ids int32 [n], all different, scale f32 [n] and bias f32 [n]."""


def make_choice(
    params: SamplingParams,
    prompt: Sequence[int],
    vocab: int,
    eos_ids: frozenset[int] = frozenset(),
    vocabulary: Vocabulary | None = None,
) -> Choice | None:
    """The state of a new request; None where its logits are never edited.

    vocab: entries of the model's vocabulary; vocabulary: the texts of its tokens, where the engine has a tokenizer.
    Raises InvalidSamplingParams, InvalidStructure for a structure that cannot be followed, TokenOutOfRange.
    """
    if not {"edits", "mask"} & params.extras.keys():
        return None
    texts = [word for word in params.bad_words if isinstance(word, str)]
    if vocabulary is None and (params.structured is not None or texts):
        what = "structured" if params.structured is not None else f"bad_words with the text {texts[0]!r}"
        raise InvalidSamplingParams(f"{what}: this engine runs on token ids alone; use an LLM, which has a tokenizer")
    sequences = [tuple(word) for word in params.bad_words if not isinstance(word, str)]
    grammar = None
    if vocabulary is not None:
        sequences += [spelling for text in texts for spelling in vocabulary.spellings(text)]
        grammar = None if params.structured is None else vocabulary.grammar(params.structured)
    named = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words": [token for sequence in sequences for token in sequence],
    }
    for name, ids in named.items():
        if (wrong := next((token for token in ids if token >= vocab), None)) is not None:
            raise TokenOutOfRange(f"{name} names token {wrong}: ids are whole numbers from 0 to {vocab - 1}")
    ends = frozenset(token for token in (*eos_ids, *params.stop_token_ids) if token < vocab)
    return Choice(params, prompt, vocab, ends, sequences, grammar)


class Choice:
    """The edits and the mask of one row, kept up to date by `token`: a function of the tokens so far, so that a
    preemption changes nothing."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab: int,
        ends: frozenset[int],
        bad_words: Sequence[tuple[int, ...]],
        grammar: Grammar | None,
    ) -> None:
        self.grammar = grammar
        self.allowed = None if params.allowed_token_ids is None else mask_of(params.allowed_token_ids, vocab)
        self._params, self._ends, self._bad_words = params, sorted(ends), bad_words
        reach = max((len(sequence) for sequence in bad_words), default=1) - 1
        self._tail = deque(prompt[-reach:] if reach else (), maxlen=reach)
        self._new = 0
        self._counts: Counter[int] = Counter()
        self._given = params.logit_bias or {}
        self._repeats = params.repetition_penalty != 1
        self._penalises = self._repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
        seen = set(prompt) if self._repeats else set()
        first = sorted(seen | self._given.keys())
        self._index = {token: i for i, token in enumerate(first)}
        self._ids = np.array(first, np.int32)
        self._bias = np.array([self._given.get(token, 0.0) for token in first], np.float32)
        self._scale = np.array([params.repetition_penalty if token in seen else 0 for token in first], np.float32)

    def token(self, token: int) -> bool:
        """Take the token that was chosen; whether the output is complete, so that the request ends with it."""
        self._new += 1
        self._tail.append(token)
        if self._penalises:
            self._penalise(token)
        return self.grammar is not None and self.grammar.accept(token)

    def edits(self) -> Edits:
        """What is to be done to the next token's logits, but for the mask."""
        edits, banned = self._table, self._banned()
        if not banned:
            return edits
        ids, scale, bias = edits
        more = [token for token in banned if token not in self._index]
        zeros = np.zeros(len(more), np.float32)
        bias = np.concatenate([bias, zeros])
        bias[[self._index[token] for token in banned if token in self._index]] = -math.inf
        bias[len(ids) :] = -math.inf
        return np.concatenate([ids, np.array(more, np.int32)]), np.concatenate([scale, zeros]), bias

    @property
    def _table(self) -> Edits:
        n = len(self._index)
        return self._ids[:n], self._scale[:n], self._bias[:n]

    def _penalise(self, token: int) -> None:
        at = self._index.setdefault(token, len(self._index))
        if at == len(self._ids):  # room for as many again
            room = (0, max(16, at))
            self._ids, self._scale = np.pad(self._ids, room), np.pad(self._scale, room)
            self._bias = np.pad(self._bias, room)
        self._counts[token] += 1
        params = self._params
        self._ids[at] = token
        self._scale[at] = params.repetition_penalty if self._repeats else 0
        penalty = params.presence_penalty + params.frequency_penalty * self._counts[token]
        self._bias[at] = self._given.get(token, 0.0) - penalty

    def _banned(self) -> list[int]:
        """Ends that come too early, and last tokens of bad words whose others have just come; no id twice."""
        found = list(self._ends) if self._new < self._params.min_tokens else []
        tail = list(self._tail)
        for *start, last in self._bad_words:
            if not start or tail[-len(start) :] == start:
                found.append(last)
        return list(dict.fromkeys(found))


def mask_of(allowed: Sequence[int], vocab: int) -> HostArray:
    """uint32 [ceil(V / 32)] with the bits of these ids."""
    flags = np.zeros(-(-vocab // 32) * 32, np.uint8)
    flags[list(allowed)] = 1
    words: HostArray = np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32)
    return words
