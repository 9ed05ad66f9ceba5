"""One request of a trace as plain numbers. Prompts are segments, so that equal beginnings share real token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

Segment = tuple[int, int]
"""An id of content, and how many tokens it has. Two prompts share a prefix where their leading segments are equal."""

MOST_TOKENS = 1 << 24
"""Of one prompt or output: no model's context is longer."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: seconds after the trace's begin, its prompt in segments, and how many tokens it generates.

    `reply` is the content id of the output, so that a later prompt can hold it. `deadline_s` counts from the arrival.
    """

    at: float
    prompt: tuple[Segment, ...]
    output_tokens: int
    reply: int = 0
    priority: int = 0
    deadline_s: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """How long the prompt is."""
        return sum(count for _, count in self.prompt)

    def token_ids(self) -> tuple[int, ...]:
        """The prompt: each segment is its id, over and over. Pages of different content differ in every token."""
        if len(self.prompt) == 1:
            ((content, count),) = self.prompt
            return (content,) * count
        return tuple(content for content, count in self.prompt for _ in range(count))


@dataclass(frozen=True)
class Trace:
    """Requests in the order in which they come; `skipped` lines of its file were bad."""

    name: str
    arrivals: Sequence[Arrival]
    skipped: int = 0

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.arrivals[-1].at - self.arrivals[0].at

    def faster(self, factor: float) -> Trace:
        """The same requests, `factor` times as close together."""
        return replace(self, arrivals=[replace(arrival, at=arrival.at / factor) for arrival in self.arrivals])
