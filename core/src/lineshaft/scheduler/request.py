"""One request as the scheduler sees it: its tokens, how many of them are computed, and how it ended.

Knows no text and no pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from lineshaft.sampling.params import SamplingParams


class Status(StrEnum):
    """Where a request is."""

    WAITING = "waiting"  # holds no pages
    RUNNING = "running"  # holds pages for all its tokens
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, the model's context or the whole KV pool is used up
    CANCELLED = "cancelled"
    ERROR = "error"  # the logits held a NaN: no token could be sampled


@dataclass(eq=False)
class Request:
    """One prompt on its way to an output. The engine makes it; once added, only the scheduler changes it."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    salt: bytes = b""  # requests share cached prefixes only under an equal salt
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose KV is in the cache; 0 again after a preemption
    cached: int = 0  # tokens found in the prefix cache at the first admission
    preemptions: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the token id, or the stop string that the engine names
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    parent: Request | None = None
    fork: int = 0
    _tokens: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = [*self.prompt, *self.output]

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and output in one live list, not to be changed."""
        known = len(self._tokens) - len(self.prompt)
        if known < len(self.output):
            self._tokens += self.output[known:]
        return self._tokens

    @property
    def remaining(self) -> int:
        """How many tokens are still to be computed before the next one can be sampled."""
        return len(self.prompt) + len(self.output) - self.computed

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.status is Status.FINISHED
