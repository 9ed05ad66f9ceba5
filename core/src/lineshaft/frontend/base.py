"""A model on a backend with its tokenizer: what the blocking and the asynchronous API open, and look at."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Self

from lineshaft.config import EngineConfig, make_config
from lineshaft.engine import Engine
from lineshaft.errors import RequestError, TokenOutOfRange
from lineshaft.plan import Plan
from lineshaft.registry import Registry
from lineshaft.runner.worker import Progress, silent
from lineshaft.sampling.vocabulary import Vocabulary
from lineshaft.tokenizer import Tokenizer
from lineshaft.weights.refs import resolve


class Base:
    """Takes every key of `EngineConfig`, nested ones as dicts (`cache={"pages": 512}`) or dotted. Raises ConfigError,
    BackendError, PlanError, ModelError, ResourceError, LayoutError."""

    def __init__(
        self,
        model: str,
        *,
        backend: str = "auto",
        dtype: str = "auto",
        registry: Registry | None = None,
        progress: Progress = silent,
        **config: Any,
    ) -> None:
        self._open(make_config(model=model, backend=backend, dtype=dtype, **config), registry, progress)

    @classmethod
    def from_config(
        cls, config: EngineConfig, *, registry: Registry | None = None, progress: Progress = silent
    ) -> Self:
        """The same from a finished configuration."""
        self = cls.__new__(cls)
        self._open(config, registry, progress)
        return self

    def _open(self, config: EngineConfig, registry: Registry | None, progress: Progress) -> None:
        self.config = config
        self.tokenizer = Tokenizer.from_checkpoint(resolve(config.tokenizer or config.model))
        self.engine = Engine(config, registry=registry, progress=progress)
        self.engine.vocabulary = Vocabulary(self.tokenizer, self.engine.vocab, self.tokenizer.eos_ids)

    @property
    def plan(self) -> Plan:
        """The frozen choice of kernels."""
        return self.engine.plan

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, as a prompt would have them. Raises RequestError for what is no Unicode text."""
        return self.tokenizer.encode(text, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises RequestError, and TokenOutOfRange for an id that the model does not have."""
        if not isinstance(token_ids, (list, tuple)):
            raise RequestError(f"token ids given as {type(token_ids).__name__}: give a list of whole numbers")
        for token in token_ids:
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) < self.engine.vocab:
                raise TokenOutOfRange(f"token {token!r}: ids are whole numbers from 0 to {self.engine.vocab - 1}")
        return self.tokenizer.decode(token_ids, skip_special_tokens)
