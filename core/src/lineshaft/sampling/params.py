"""The sampling parameters of one request, validated and normalised when they are made.

Knows nothing of models: a stop token's upper bound and the end-of-sequence ids are the engine's to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from lineshaft.errors import InvalidSamplingParams

_UINT64_END = 1 << 64
_INT32_END = 1 << 31


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Raises InvalidSamplingParams for any value that means nothing. After construction numbers are plain `int` and
    `float`, `stop` and `stop_token_ids` are tuples, and `top_k` is 0 where it is off.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0  # 0 is off
    seed: int | None = None  # None: the engine picks one
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None  # how many alternatives a token; 0 is the chosen token alone, None is off
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._set("temperature", _real("temperature", self.temperature, "a finite number >= 0", lambda x: x >= 0))
        self._set("top_p", _real("top_p", self.top_p, "a number > 0 and <= 1", lambda x: 0 < x <= 1))
        self._set("min_p", _real("min_p", self.min_p, "a number >= 0 and < 1", lambda x: 0 <= x < 1))
        self._set("top_k", max(0, _integer("top_k", self.top_k, -1, _INT32_END)))
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, 1, _INT32_END))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, 0, _UINT64_END))
        if self.logprobs is not None:
            self._set("logprobs", _integer("logprobs", self.logprobs, 0, _INT32_END))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_tokens(self.stop_token_ids))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, with no randomness."""
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is after construction."""
        return _stop_strings(self.stop)


def _require(valid: bool, name: str, given: object, allowed: str) -> None:
    if not valid:
        shown = repr(given)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise InvalidSamplingParams(f"{name} = {shown} is not allowed: give {allowed}, or leave {name} out")


def _real(name: str, value: object, allowed: str, valid: Callable[[float], bool]) -> float:
    _require(isinstance(value, Real) and not isinstance(value, bool), name, value, allowed)
    assert isinstance(value, Real)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond float64
        number = math.inf
    _require(math.isfinite(number) and valid(number), name, value, allowed)
    return number


def _integer(name: str, value: object, low: int, end: int) -> int:
    allowed = f"an integer from {low} to {end - 1}"
    _require(isinstance(value, Integral) and not isinstance(value, bool), name, value, allowed)
    assert isinstance(value, Integral)
    _require(low <= int(value) < end, name, value, allowed)
    return int(value)


def _stop_strings(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else None
    valid = stops is not None and all(isinstance(text, str) and text for text in stops)
    _require(valid, "stop", stop, "a string or a list of strings, none of them empty")
    assert stops is not None
    return stops


def _stop_tokens(ids: object) -> tuple[int, ...]:
    _require(isinstance(ids, list | tuple | set | frozenset), "stop_token_ids", ids, "a list of token ids")
    assert isinstance(ids, list | tuple | set | frozenset)
    return tuple(_integer("stop_token_ids", token, 0, _INT32_END) for token in ids)
