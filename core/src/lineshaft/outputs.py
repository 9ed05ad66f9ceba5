"""What a user gets back: texts, token ids, log-probabilities and times. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

RequestId = int | str
"""The engine's number of a request, or the name that its user gave it."""


class Logprob(NamedTuple):
    """One token's natural-log probability, its rank (1 = likeliest; 0 where it is below those asked for) and text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class ToolCall:
    """A function that an answer asks for, with its arguments as the model gave them, unchecked."""

    name: str
    arguments: dict[str, Any]


@dataclass
class CompletionOutput:
    """One generated sequence. `logprobs` holds, for each token, the chosen one and the likeliest ones by id.

    `text` is "" where detokenizing is off. `tool_calls` are those found in the answer of a chat with tools; `text`
    keeps them as they were written.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # a `FinishReason`: "stop", "length", ...; None while it runs
    stop_reason: int | str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one request in seconds, and how it fared."""

    ttft_s: float  # from arrival to the first token
    tpot_s: float  # mean time of each further token; 0 if there is none
    queue_s: float  # from arrival to the first step that computes it
    total_s: float
    cached_tokens: int
    preemptions: int


@dataclass
class RequestOutput:
    """One prompt and what became of it: n samples, by `best_of` the likeliest first.

    `prompt_logprobs` holds an entry for each token of the prompt, of which the first is None: nothing comes before it.
    """

    request_id: RequestId
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True)
class StreamDelta:
    """What was added to one sample of a request since its last delta. The request's last one brings its `output`."""

    request_id: RequestId
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    index: int = 0  # which of the n samples
    logprobs: tuple[dict[int, Logprob], ...] = ()
    output: RequestOutput | None = None


@dataclass(frozen=True)
class RunMetrics:
    """What an engine did so far. Times in milliseconds are medians over steps; rates count the time spent in steps."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: float  # median over requests
    tpot_s: float  # median over requests
    tokens_per_s: float
    host_ms_per_decode_step: float  # decode steps of one row: wall time less the kernels' own; 0 where steps overlap
    kernel_ms_per_decode_step: float
    steps: int
    preemptions: int
    prefix_hit_tokens: int
    pages_used: int  # most at once, over all cache groups
    pages_total: int
    page_size: int
    load_s: float = 0.0
    capture_s: float = 0.0
