"""One prompt and its samples: started together, shown together, ranked where the best of several is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from lineshaft.engine import Engine
from lineshaft.errors import InvalidSamplingParams
from lineshaft.flight import Token
from lineshaft.frontend.prompts import Ask
from lineshaft.frontend.text import Text, spelled
from lineshaft.frontend.tools import tool_calls
from lineshaft.outputs import CompletionOutput, RequestId, RequestMetrics, RequestOutput, StreamDelta
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import FinishReason, Request
from lineshaft.tokenizer import Tokenizer


class Group:
    """The samples of one prompt. `error`, if set, is what its reader gets in the place of further deltas."""

    def __init__(
        self, ask: Ask, requests: Sequence[Request], tokenizer: Tokenizer, label: RequestId | None, streamed: bool
    ) -> None:
        self.label = requests[0].id if label is None else label
        self.texts = [Text(request, i, self.label, tokenizer, streamed) for i, request in enumerate(requests)]
        self.error: BaseException | None = None
        self._ask, self._tokenizer = ask, tokenizer
        self._n = ask.params.n
        self.read = False  # whether `take` has given everything

    @property
    def finished(self) -> bool:
        """Whether nothing will follow."""
        return all(text.finish_reason is not None for text in self.texts)

    def take(self) -> list[StreamDelta]:
        """What nobody has seen yet, a delta for each sample that has grown; of ranked samples nothing until the end.

        May be called while another thread feeds the texts.
        """
        self.read = self.finished
        if self._ranked and not self.read:
            return []
        deltas = [merged(text) for text in (self._kept() if self.read else self.texts) if text.pending]
        if self._ranked:
            deltas = [dataclasses.replace(delta, index=index) for index, delta in enumerate(deltas)]
        if self.read:
            deltas = deltas or [self._nothing_new()]
            deltas[-1] = dataclasses.replace(deltas[-1], output=self.output())
        return deltas

    def _nothing_new(self) -> StreamDelta:
        """What follows a last delta that was taken just before its text was marked finished."""
        last = self.texts[-1]
        return StreamDelta(self.label, "", finish_reason=last.finish_reason, index=last.index)

    def output(self) -> RequestOutput:
        """What became of the prompt so far."""
        first = self.texts[0].request
        scores = self.texts[0].prompt_logprobs
        return RequestOutput(
            self.label,
            self._ask.text,
            list(first.prompt),
            [self._completion(i, text) for i, text in enumerate(self._kept())],
            self._metrics(),
            self.finished,
            first.cached,
            None if scores is None else [None if one is None else spelled(self._tokenizer, one) for one in scores],
        )

    @property
    def _ranked(self) -> bool:
        return len(self.texts) > self._n

    def _kept(self) -> list[Text]:
        """The samples that are wanted: all, or the likeliest ones, those that failed last."""
        if not self._ranked:
            return self.texts
        failed = (FinishReason.ERROR, FinishReason.CANCELLED)
        return sorted(self.texts, key=lambda text: (text.finish_reason in failed, -text.total))[: self._n]

    def _completion(self, index: int, text: Text) -> CompletionOutput:
        made = text.completion(index, logprobs=self._ask.params.logprobs is not None)
        if self._ask.tools is not None:
            made.tool_calls = tool_calls(self._tokenizer.decode(text.token_ids, skip_special=False), self._ask.tools)
        return made

    def _metrics(self) -> RequestMetrics:
        """The first sample's times, up to the end of the last one."""
        each = [text.metrics for text in self.texts]
        return dataclasses.replace(
            each[0],
            total_s=max(one.total_s for one in each),
            cached_tokens=self.texts[0].request.cached,
            preemptions=sum(text.request.preemptions for text in self.texts),
        )


def start(
    engine: Engine, ask: Ask, tokenizer: Tokenizer, *, label: RequestId | None = None, streamed: bool = True
) -> Group:
    """Queue all samples of a prompt, or none. Raises what `Engine.add` raises."""
    params = drawn_params(engine, ask.params)
    requests: list[Request] = []
    try:
        for fork in range(params.width):
            parent = requests[0] if requests else None
            request = engine.add(
                ask.ids, params, tokenizer.eos_ids, ask.salt,
                priority=ask.priority, deadline_s=ask.deadline_s, parent=parent, fork=fork,
            )  # fmt: skip
            requests.append(request)
            params = request.params
    except BaseException:
        cancel(engine, requests)
        raise
    return Group(ask, requests, tokenizer, label, streamed)


def drawn_params(engine: Engine, params: SamplingParams) -> SamplingParams:
    """The parameters with the log-probabilities that choosing the best of several needs."""
    if params.n == params.width or params.logprobs is not None:
        return params
    if not engine.config.max_logprobs:
        raise InvalidSamplingParams(
            f"best_of = {params.width} for n = {params.n}: choosing needs log-probabilities, and the engine was made "
            "with max_logprobs = 0; raise it, or leave best_of out"
        )
    return dataclasses.replace(params, logprobs=0)


def cancel(engine: Engine, requests: Iterable[Request]) -> None:
    """End those that are unfinished."""
    for request in requests:
        if not request.finished:
            engine.cancel(request.id)


def stop(engine: Engine, text: Text) -> None:
    """End a request whose text has come to a stop string."""
    if not text.request.finished:
        engine.finish(text.request, FinishReason.STOP, text.stop_string)


def marked(tokens: Sequence[Token]) -> Iterator[tuple[Token, bool]]:
    """The tokens of one step in their order, each with whether it is its request's last."""
    last = {token.request.id: at for at, token in enumerate(tokens)}
    for at, token in enumerate(tokens):
        yield token, token.request.finished and last[token.request.id] == at


def merged(text: Text) -> StreamDelta:
    """All that is pending of a text, as one delta."""
    deltas = [text.pending.popleft() for _ in range(len(text.pending))]
    if len(deltas) == 1:
        return deltas[0]
    return dataclasses.replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(found for delta in deltas for found in delta.logprobs),
    )
