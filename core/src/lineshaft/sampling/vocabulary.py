"""What sampling needs to know of tokens' texts: the grammars of structured outputs, and how bad words are spelled.

The one place that knows the grammar library, which is loaded with the first structured output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any, Protocol

import numpy as np

from lineshaft.errors import InvalidStructure
from lineshaft.sampling.structured import Structured
from lineshaft_contract.host import usable_cpus

KEPT = 64
"""Grammars that are kept compiled, those used last."""
MOST_THREADS = 8
"""Threads that compute masks of several rows at once, on a machine with so many CPUs."""
NO_OUTPUT = "NoExtensionBias"
"""What the grammar library says where no token may come first."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,100}"
"""Between two parts of a JSON text: more than an indentation needs, less than a model that has gone astray writes. A
schema with "x-guidance" says for itself what may stand there."""


class Pieces(Protocol):
    """The bytes of tokens."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def piece(self, token_id: int) -> bytes: ...


class Tokenizer(Protocol):
    """What a tokenizer must offer here."""

    @property
    def pieces(self) -> Pieces: ...

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...


class Grammar:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary

    def accept(self, token: int) -> bool:
        """Take one more token; whether the output is complete, so that nothing but an end may follow."""
        self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped()) and not self.failed

    @property
    def failed(self) -> bool:
        """Whether a token was not allowed, or the grammar became too large to follow."""
        return bool(self.matcher.is_error())


class Vocabulary:
    """A tokenizer's tokens, as the model's vocabulary of `size` ids has them. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: frozenset[int]) -> None:
        self.size, self.eos_ids = size, eos_ids
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._compiled = lru_cache(KEPT)(self._compile)

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """The token ids of a word, at the start of a text and after a space."""
        word = word.lstrip(" ")
        found = (tuple(self._tokenizer.encode(text, add_special=False)) for text in (word, f" {word}"))
        return [ids for ids in dict.fromkeys(found) if ids]

    # ---- grammars ----------------------------------------------------------------------------------------------

    def grammar(self, structured: Structured) -> Grammar:
        """A grammar at its start.

        The first one takes as long as the tokens take to sort, a known one a copy, a wrong or huge one at most about
        a second. Raises InvalidStructure.
        """
        return Grammar(self._compiled(structured).deep_copy(), self)

    def fill(self, grammars: Sequence[tuple[Grammar, int]], mask: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
        """Write what each grammar allows next into its row of mask uint32[R, ceil(V / 32)]: nothing where it failed."""
        width = mask.shape[1] * 4
        if len(grammars) == 1:
            grammar, row = grammars[0]
            grammar.matcher.unsafe_compute_mask_ptr(mask[row].ctypes.data, width)
        else:
            pairs = [(grammar.matcher, row) for grammar, row in grammars]
            self._pool.unsafe_compute_mask_ptr(pairs, mask.ctypes.data, width, len(mask))
        for grammar, row in grammars:
            if grammar.failed:
                mask[row] = 0

    def _compile(self, structured: Structured) -> Any:
        """One at a time; known grammars are copied meanwhile."""
        if not self.eos_ids:
            raise InvalidStructure("structured: the model has no end-of-sequence token to end such an output with")
        with self._lock:
            return self._matcher(structured)

    def _matcher(self, structured: Structured) -> Any:
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokens, _grammar_text(structured), log_level=0)
        except ValueError as error:
            raise InvalidStructure(f"structured.{structured.kind}: {_reason(str(error))}") from error
        probe = matcher.deep_copy()
        probe.compute_bitmask()  # some grammars show only now that they lead nowhere, or are too large
        if probe.is_error():
            raise InvalidStructure(f"structured.{structured.kind}: {_reason(probe.get_error())}")
        return matcher

    @cached_property
    def _tokens(self) -> Any:
        from llguidance import LLTokenizer

        wrapper = _Wrapper(self._tokenizer, self.size, self.eos_ids)
        made = LLTokenizer(wrapper, n_vocab=self.size, eos_token=sorted(self.eos_ids))  # type: ignore[arg-type]
        wrapper.greedy = made.greedy_tokenize
        return made

    @cached_property
    def _pool(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor(min(usable_cpus(), MOST_THREADS))


def _grammar_text(structured: Structured) -> str:
    """The structure as the grammar library reads it."""
    from llguidance import LLMatcher, grammar_from

    value = structured.value
    if not isinstance(value, str):
        return grammar_from("choice", json.dumps(value))
    if structured.kind == "json":
        defaults = None if '"x-guidance"' in value else {"whitespace_pattern": WHITESPACE}
        return LLMatcher.grammar_from_json_schema(value, defaults=defaults)  # type: ignore[arg-type]
    return grammar_from("regex" if structured.kind == "regex" else "grammar", value)


def _reason(message: str) -> str:
    """The first line of the library's message, and what a parser says further down in a line of its own."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["it cannot be used"]
    if lines[0] == NO_OUTPUT:
        return "nothing can be written that follows it: it refers to itself without an end, or contradicts itself"
    said = next((line.removeprefix("error: ") for line in lines[1:] if line.startswith("error: ")), "")
    return f"{lines[0][:300]} {said[:300]}".strip()


class _Wrapper:
    """The tokenizer as the grammar library asks for it."""

    is_tokenizer_wrapper = True
    greedy: Callable[[str], list[int]]

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: frozenset[int]) -> None:
        pieces = tokenizer.pieces
        self.tokens = [pieces.piece(token) for token in range(size)]
        self.special_token_ids = sorted(pieces.special_ids | eos_ids)
        self.eos_token_id, self.bos_token_id = min(eos_ids), None
        self._encode, self._special = tokenizer.encode, frozenset(self.special_token_ids)

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are the text's, none of them special: the tokenizer's own, unless it adds something."""
        ids = self._encode(text, add_special=False)
        fits = self._special.isdisjoint(ids) and max(ids, default=0) < len(self.tokens)
        same = fits and b"".join(self.tokens[token] for token in ids) == text.encode()
        return ids if same else self.greedy(text)
