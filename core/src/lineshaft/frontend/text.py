"""The growing text of one sample: detokenized, cut at its stop strings, with what was chosen and how likely.

It may be fed in another thread than the one that steps the engine, later than that: so it keeps what it was given,
and asks the request for nothing that may have changed since.
"""

from __future__ import annotations

from collections import deque

from lineshaft.flight import Token
from lineshaft.outputs import CompletionOutput, Logprob, RequestId, RequestMetrics, StreamDelta
from lineshaft.sampling.logprobs import TokenLogprobs
from lineshaft.sampling.stop import StopStrings
from lineshaft.scheduler import FinishReason, Request
from lineshaft.tokenizer import Detokenizer, Tokenizer


class Text:
    """One sample of a request. `pending` are the deltas that nobody has seen yet, if anybody streams them."""

    def __init__(self, request: Request, index: int, label: RequestId, tokenizer: Tokenizer, streamed: bool) -> None:
        params = request.params
        self.request, self.index, self._label = request, index, label
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None  # set when nothing will follow
        self.stop_reason: int | str | None = None
        self.metrics = RequestMetrics(0.0, 0.0, 0.0, 0.0, 0, 0)
        self.pending: deque[StreamDelta] = deque(maxlen=None if streamed else 0)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.total = 0.0  # the sum of the log-probabilities, where they were asked for
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens) if params.detokenize else None
        self._stops = StopStrings(params.stop or (), params.include_stop_str_in_output)
        self._unstoppable = params.min_tokens
        self._parts: list[str] = []
        self._logprobs: list[dict[int, Logprob]] = []

    def feed(self, token: Token, last: bool) -> bool:
        """Take a token, the request's last one or not; return whether it completed a stop string. No-op at the end."""
        if self.finish_reason is not None:
            return False
        ended = self.request.finish_reason if last else None
        logprobs = self._book(token)
        stop_token = ended is FinishReason.STOP and self.request.stop_reason is not None
        shown, hit = self._grow("" if stop_token else self._piece(token), ends=last)
        ids = (token.token_id,) if token.token_id >= 0 else ()
        reason = "stop" if hit else None if ended is None else str(ended)
        if reason is not None:
            self.metrics = token.clock.metrics(self.request.cached, self.request.preemptions)
            self.stop_reason = self._stops.hit if hit else self.request.stop_reason
        self._show(shown, ids, logprobs, reason)
        return hit

    def end(self) -> None:
        """The request ended without a further token: cancelled, or past its deadline. No-op at the end."""
        if self.finish_reason is None:
            shown, _ = self._grow("", ends=True)
            self.stop_reason = self.request.stop_reason
            self._show(shown, (), (), str(self.request.finish_reason))

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.hit

    def _piece(self, token: Token) -> str:
        return "" if self._detokenizer is None or token.token_id < 0 else self._detokenizer.feed(token.token_id)

    def _grow(self, text: str, *, ends: bool) -> tuple[str, bool]:
        """Append; return what may be shown of it, and whether a stop string was hit."""
        if len(self.token_ids) < self._unstoppable and not ends:
            return text, False
        shown, hit = self._stops.feed(text)
        if not hit and ends:
            more, hit = self._stops.feed("" if self._detokenizer is None else self._detokenizer.finish())
            shown += more + ("" if hit else self._stops.flush())
        return shown, hit

    def _show(
        self, text: str, ids: tuple[int, ...], logprobs: tuple[dict[int, Logprob], ...], reason: str | None
    ) -> None:
        """The delta comes first: whoever sees the reason will find it."""
        self._parts.append(text)
        self.pending.append(StreamDelta(self._label, text, ids, reason, self.index, logprobs))
        self.finish_reason = reason

    def _book(self, token: Token) -> tuple[dict[int, Logprob], ...]:
        if token.token_id >= 0:
            self.token_ids.append(token.token_id)
        self.prompt_logprobs = token.prompt_logprobs or self.prompt_logprobs
        if token.logprobs is None:
            return ()
        self.total += token.logprobs[token.token_id][0]
        self._logprobs.append(spelled(self._tokenizer, token.logprobs))
        return (self._logprobs[-1],)

    def completion(self, index: int, *, logprobs: bool) -> CompletionOutput:
        """What became of the sample so far."""
        return CompletionOutput(
            index=index,
            text="".join(self._parts),
            token_ids=list(self.token_ids),
            cumulative_logprob=self.total if self.request.params.logprobs is not None else None,
            logprobs=list(self._logprobs) if logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def spelled(tokenizer: Tokenizer, found: dict[int, tuple[float, int]]) -> dict[int, Logprob]:
    """Log-probabilities and ranks by token id, with the tokens' texts."""
    return {i: Logprob(p, rank, tokenizer.decode([i], skip_special=False)) for i, (p, rank) in found.items()}
