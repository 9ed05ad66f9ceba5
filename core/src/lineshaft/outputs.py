"""What a user gets back: texts, token ids, log-probabilities and times. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Logprob(NamedTuple):
    """One token's natural-log probability, its rank (1 = likeliest; 0 where it is below those asked for) and text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One generated sequence. `logprobs` holds, for each token, the chosen one and the likeliest ones by id."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # "stop", "length", "cancelled", "error"; None while it runs
    stop_reason: int | str | None = None


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
    """One prompt and what became of it."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class StreamDelta:
    """What one step added to a request."""

    request_id: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class RunMetrics:
    """What an engine did so far. Times in milliseconds are medians over steps; rates count the time spent in steps."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: float  # median over requests
    tpot_s: float  # median over requests
    tokens_per_s: float
    host_ms_per_decode_step: float  # decode steps of one row: wall time less the kernels' own
    kernel_ms_per_decode_step: float
    steps: int
    preemptions: int
    prefix_hit_tokens: int
    pages_used: int  # most at once, over all cache groups
    pages_total: int
    page_size: int
    load_s: float = 0.0
    capture_s: float = 0.0
