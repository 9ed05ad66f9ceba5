"""The sampling parameters of one request, validated and normalised when they are made.

Knows nothing of models: the vocabulary's size and the end-of-sequence ids are the engine's to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any

from lineshaft.errors import InvalidSamplingParams
from lineshaft.sampling.structured import Structured

LogitsProcessor = Callable[[Sequence[int], Sequence[int], Any], Any]
"""(output ids, prompt ids, logits float32 [V] as a NumPy array of its own) -> logits float32 [V]."""

_UINT64_END = 1 << 64
_INT32_END = 1 << 31
_FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize")
_REALS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a finite number >= 0", lambda x: x >= 0),
    "top_p": ("a number > 0 and <= 1", lambda x: 0 < x <= 1),
    "min_p": ("a number >= 0 and < 1", lambda x: 0 <= x < 1),
    "typical_p": ("a number > 0 and <= 1", lambda x: 0 < x <= 1),
    "repetition_penalty": ("a number from 0.01 to 100", lambda x: 0.01 <= x <= 100),
    "presence_penalty": ("a number from -2 to 2", lambda x: -2 <= x <= 2),
    "frequency_penalty": ("a number from -2 to 2", lambda x: -2 <= x <= 2),
}
_INTEGERS = {
    "n": (1, 1 << 16), "best_of": (1, 1 << 16), "top_k": (-1, _INT32_END), "seed": (0, _UINT64_END),
    "max_tokens": (1, _INT32_END), "min_tokens": (0, _INT32_END), "logprobs": (0, _INT32_END),
    "prompt_logprobs": (0, _INT32_END), "truncate_prompt_tokens": (1, _INT32_END),
}  # fmt: skip
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "edits": ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "bad_words"),
    "mask": ("allowed_token_ids", "structured"),
    "typical_p": ("typical_p",),
}
"""The optional programs, and the parameters that need them where they have a value."""
_MAY_BE_NONE = frozenset({"best_of", "seed", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"})


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends; names and meaning are vLLM's.

    Raises InvalidSamplingParams for any value that means nothing and for values that contradict each other. After
    construction numbers are plain `int` and `float`, sequences are tuples, `logit_bias` is a dict, and `top_k` is 0
    where it is off.
    """

    n: int = 1  # how many outputs of the prompt
    best_of: int | None = None  # how many are made, of which the n likeliest are kept; None: n
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0  # 0 is off
    typical_p: float = 1.0  # 1 is off
    repetition_penalty: float = 1.0  # of tokens of prompt and output; 1 is off
    presence_penalty: float = 0.0  # of tokens of the output, once
    frequency_penalty: float = 0.0  # of tokens of the output, each time
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # by token id, from -100 to 100
    allowed_token_ids: Sequence[int] | None = None  # no other token is sampled
    bad_words: Sequence[str | Sequence[int]] = ()  # texts, or sequences of token ids, that are never completed
    seed: int | None = None  # None: the engine picks one
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # before that many, no token that would end the output
    max_tokens: int = 16
    logprobs: int | None = None  # how many alternatives a token; 0 is the chosen token alone, None is off
    prompt_logprobs: int | None = None  # the same of the prompt's own tokens
    detokenize: bool = True  # False: token ids alone
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None  # only so many last tokens of the prompt are used
    structured: Structured | None = None
    logits_processors: Sequence[LogitsProcessor] = ()  # run on the host, one after the other

    def __post_init__(self) -> None:
        for name, (allowed, valid) in _REALS.items():
            self._set(name, _real(name, getattr(self, name), allowed, valid))
        for name, (low, end) in _INTEGERS.items():
            if name not in _MAY_BE_NONE or getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), low, end))
        for name in _FLAGS:
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        self._set("top_k", max(0, self.top_k))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _tokens("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("bad_words", _bad_words(self.bad_words))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", tuple(sorted(set(_tokens("allowed_token_ids", self.allowed_token_ids)))))
        self._set("logits_processors", _processors(self.logits_processors))
        kind = isinstance(self.structured, Structured | None)
        _require(kind, "structured", self.structured, "a Structured with one of json, regex, grammar, choice")
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        width, few, many = self.width, self.min_tokens, self.max_tokens
        ids, structured, texts = self.allowed_token_ids, self.structured is not None, bool(self.stop)
        equal = f"temperature = 0 and {width} outputs, which would be equal"
        wrong = (
            (width < self.n, f"best_of = {width} and n = {self.n}: give a best_of of at least n"),
            (self.greedy and width > 1, f"{equal}: give n = 1, or a temperature above 0"),
            (few > many, f"min_tokens = {few} and max_tokens = {many}: give a min_tokens of at most max_tokens"),
            (ids == (), "allowed_token_ids = (): give at least one token id, or leave it out"),
            (ids is not None and structured, "allowed_token_ids and structured: give only one of them"),
            (few > 0 and structured, f"min_tokens = {few} and structured, which ends by itself: leave min_tokens out"),
            (texts and not self.detokenize, "stop and detokenize = false: stop looks at text; give stop_token_ids"),
        )
        for found, message in wrong:
            if found:
                raise InvalidSamplingParams(message)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, with no randomness."""
        return self.temperature == 0

    @property
    def width(self) -> int:
        """How many outputs are made."""
        return self.best_of or self.n

    @cached_property
    def filters(self) -> tuple[float, float, float, float, int]:
        """temperature, top_p, min_p, typical_p and top_k, as the op `sample` reads them."""
        return self.temperature, self.top_p, self.min_p, self.typical_p, self.top_k

    @cached_property
    def extras(self) -> Mapping[str, str]:
        """What of the optional programs this needs: "edits", "mask", "typical_p", each with the parameter that does."""
        found = {
            kind: next((name for name in names if getattr(self, name) != getattr(_NEUTRAL, name)), "")
            for kind, names in EXTRAS.items()
        }
        return {kind: name for kind, name in found.items() if name and not (kind == "typical_p" and self.greedy)}


def check_extras(params: SamplingParams, declined: Mapping[str, str]) -> None:
    """Raises InvalidSamplingParams where the request needs an optional program that is not there: name -> reason."""
    for kind, name in params.extras.items():
        if kind in declined:
            raise InvalidSamplingParams(f"{name} is not possible here: {declined[kind]}")


def _require(valid: bool, name: str, given: object, allowed: str) -> None:
    if not valid:
        raise InvalidSamplingParams(f"{name} = {given!r:.80} is not allowed: give {allowed}, or leave {name} out")


def _real(name: str, value: Any, allowed: str, valid: Callable[[float], bool]) -> float:
    _require(isinstance(value, Real) and not isinstance(value, bool), name, value, allowed)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = math.inf
    _require(math.isfinite(number) and valid(number), name, value, allowed)
    return number


def _integer(name: str, value: Any, low: int, end: int) -> int:
    valid = isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) < end
    _require(valid, name, value, f"an integer from {low} to {end - 1}")
    return int(value)


def _listed(name: str, value: Any, allowed: str) -> tuple[Any, ...]:
    _require(isinstance(value, list | tuple | set | frozenset), name, value, allowed)
    return tuple(value)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    valid = isinstance(stops, list | tuple) and all(isinstance(text, str) and text for text in stops)
    _require(valid, "stop", stop, "a string or a list of strings, none of them empty")
    return tuple(stops)


def _tokens(name: str, ids: Any) -> tuple[int, ...]:
    return tuple(_integer(name, token, 0, _INT32_END) for token in _listed(name, ids, "a list of token ids"))


def _biases(biases: Any) -> dict[int, float]:
    if biases is None:
        return {}
    allowed = "a dict of token id to a number from -100 to 100"
    _require(isinstance(biases, Mapping), "logit_bias", biases, allowed)
    return {
        _integer("logit_bias", token, 0, _INT32_END): _real("logit_bias", bias, allowed, lambda x: -100 <= x <= 100)
        for token, bias in biases.items()
    }


def _bad_words(words: Any) -> tuple[str | tuple[int, ...], ...]:
    allowed = "a list of texts or of lists of token ids, none of them empty"
    listed = () if words is None else _listed("bad_words", words, allowed)
    _require(all(isinstance(word, str | list | tuple) and len(word) for word in listed), "bad_words", words, allowed)
    return tuple(word if isinstance(word, str) else _tokens("bad_words", word) for word in listed)


def _processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    listed = () if processors is None else _listed("logits_processors", processors, "a list of functions")
    _require(all(map(callable, listed)), "logits_processors", processors, "a list of functions")
    return listed


_NEUTRAL = SamplingParams()
