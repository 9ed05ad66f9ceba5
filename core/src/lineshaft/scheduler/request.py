"""One request as the scheduler sees it: its tokens, how far it is scheduled and computed, and how it ended.

Knows no text and no pages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler.cost import RequestCost


class Status(StrEnum):
    """Where a request is."""

    WAITING = "waiting"  # holds no pages, at most some on the host
    RUNNING = "running"  # holds pages for all its tokens, in groups with a window for its next ones
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, the model's context or the whole KV pool is used up
    CANCELLED = "cancelled"
    ERROR = "error"  # the logits held a NaN: no token could be sampled
    DEADLINE = "deadline"  # its time was up
    REJECTED = "rejected"  # pages were lacking, and the preemption policy is "reject"


@dataclass(eq=False, slots=True)
class Request:
    """One prompt on its way to an output. The engine makes it; once added, only the scheduler changes it."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    salt: bytes = b""  # requests share cached prefixes only under an equal salt, which also names the tenant
    priority: int = 0  # lower runs first
    arrival: float = 0.0  # seconds
    deadline: float | None = None  # seconds, on the clock of `arrival`
    parent: Request | None = None  # another request of the same prompt and salt, whose pages it starts on
    fork: int = 0  # which sample of the prompt it is; 0 without a parent
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose KV is in the cache by committed steps; 0 again after a preemption
    scheduled: int = 0  # the same, with the steps that are not committed yet
    in_flight: int = 0  # tokens that such steps sample, and nobody knows yet
    cached: int = 0  # tokens found in the prefix cache, or taken from the parent, at the first admission
    preemptions: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the token id, or the stop string that the engine names
    epoch: int = 0  # how often it lost its pages; a row of an older epoch computed nothing that is kept
    swapped: int = 0  # tokens whose KV is on the host
    chunks: int = 0  # rows of it that sampled nothing
    length: int = field(init=False)  # tokens of prompt and output, with those in flight
    most: int = sys.maxsize  # the length at which it ends
    notable: int = sys.maxsize  # the length at which it ends or begins to straggle
    straggling: bool = False  # whether its output is far longer than was expected
    promoted: bool = False  # whether it waited so long that it goes before all others
    number: int = 0  # how many requests the scheduler was given before it
    rank: tuple[float, ...] = ()  # its place among all others, the lowest first
    cost: RequestCost | None = None  # what it is expected to take
    stops: frozenset[int] = field(init=False)  # the token ids that end it
    _tokens: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = [*self.prompt, *self.output]
        self.length = len(self._tokens)
        self.stops = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self.stops |= self.eos_ids

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and output in one live list, not to be changed."""
        known = len(self._tokens) - len(self.prompt)
        if known < len(self.output):
            self._tokens += self.output[known:]
        return self._tokens

    @property
    def remaining(self) -> int:
        """How many tokens, known or in flight, are still to be scheduled before the next one can be sampled."""
        return self.length - self.scheduled

    @property
    def scores_prompt(self) -> bool:
        """Whether logits of its prompt's tokens are still wanted (`prompt_logprobs`); never after the first output."""
        return self.params.prompt_logprobs is not None and self.length == len(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.status is Status.FINISHED
