"""The Python API of servers: many requests at once, each an asynchronous iterator, over one engine.

Three kinds of threads share the work. The engine's only steps and queues what it got. The reader's makes texts of that.
Event loops submit, wait and yield, and are never blocked: prompts are encoded elsewhere, and a slow consumer finds all
that came meanwhile in one delta.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from threading import Lock
from typing import Any, Unpack

from lineshaft.config import EngineConfig
from lineshaft.errors import RequestError, SessionClosed
from lineshaft.flight import Token
from lineshaft.frontend.base import Base
from lineshaft.frontend.group import Group, cancel, start, stop
from lineshaft.frontend.prompts import Ask, ChatOptions, Conversation, Options, Prompt, chats, completions
from lineshaft.frontend.stepping import EngineThread, ordinary
from lineshaft.frontend.text import Text
from lineshaft.outputs import RequestId, RunMetrics, StreamDelta
from lineshaft.registry import Registry
from lineshaft.runner.worker import Progress
from lineshaft.sampling.params import SamplingParams
from lineshaft.scheduler import Request


class Stream:
    """One consumer: the event loop that it waits in, and the group that it reads."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ready = asyncio.Event()
        self.group: Group | None = None


class AsyncLLM(Base):
    """A model on a backend, for many consumers at once. Use it with `async with`, or await `shutdown`.

    Takes what `LLM` takes, and raises what that raises. Consumers may run in several event loops.
    """

    def _open(self, config: EngineConfig, registry: Registry | None, progress: Progress) -> None:
        super()._open(config, registry, progress)
        self._texts: dict[int, tuple[Stream, Text]] = {}
        self._streams: dict[RequestId, Stream] = {}
        self._numbers = count()
        self._closing = Lock()
        self._closed = False
        self._reader = ThreadPoolExecutor(1, "lineshaft-reader")
        self._thread = EngineThread(self.engine, self)
        self._thread.start()

    # ---- generating --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: RequestId | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[StreamDelta, None]:
        """Complete one prompt, yielding what is new as soon as the consumer asks; the last delta has the `output`.

        A consumer that leaves, or whose task is cancelled, cancels the request. `request_id` is a name for `abort`, and
        for deltas and output; of those running no two may be equal. Raises RequestError; SessionClosed after or by
        `shutdown`; and what a step raised, which ends all requests. Each is raised when the iteration begins, or later.
        """
        return self._answer(partial(completions, self.tokenizer, prompt, sampling_params, **options), request_id)

    def chat(
        self,
        conversation: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: RequestId | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[StreamDelta, None]:
        """Answer one conversation, like `generate`; ChatError where messages, tools or template are wrong."""
        return self._answer(partial(chats, self.tokenizer, conversation, sampling_params, **options), request_id)

    async def abort(self, request_id: RequestId) -> None:
        """End a request: its consumer's last delta says "cancelled". No-op where none of that name is running."""
        stream = self._streams.get(request_id)
        if stream is not None:
            await asyncio.wrap_future(self._thread.call(partial(self._cancel, stream)))

    async def _answer(self, make: Callable[[], list[Ask]], name: RequestId | None) -> AsyncGenerator[StreamDelta, None]:
        asks = await asyncio.to_thread(self._prepared, make)
        if len(asks) != 1:
            raise RequestError(f"{len(asks)} prompts for one request: give one")
        if not isinstance(name, int | str | None):
            raise RequestError(f"request_id = {name!r:.60}: give a whole number or a text, or none")
        label = next(number for number in self._numbers if number not in self._streams) if name is None else name
        stream = Stream()
        if self._streams.setdefault(label, stream) is not stream:
            raise RequestError(f"request_id {label!r} is running already: give another, or none")
        try:
            await asyncio.wrap_future(self._thread.call(partial(self._begin, stream, asks[0], label)))
            group = stream.group
            assert group is not None
            while not group.read:
                await stream.ready.wait()
                stream.ready.clear()
                for delta in group.take():
                    yield delta
                if group.error is not None and not group.read:
                    raise group.error
        finally:
            del self._streams[label]
            if stream.group is None or not stream.group.finished:
                self._thread.call(partial(self._cancel, stream))

    def _prepared(self, make: Callable[[], list[Ask]]) -> list[Ask]:
        """The prompts encoded, and their grammars compiled, which the engine's thread should not wait for."""
        asks = make()
        for ask in asks:
            if ask.params.structured is not None and self.engine.vocabulary is not None:
                self.engine.vocabulary.grammar(ask.params.structured)
        return asks

    # ---- in the engine's thread --------------------------------------------------------------------------------

    def _begin(self, stream: Stream, ask: Ask, label: RequestId) -> None:
        group = stream.group = start(self.engine, ask, self.tokenizer, label=label)
        self._thread.watch([text.request for text in group.texts])
        self._texts.update({text.request.id: (stream, text) for text in group.texts})

    def _cancel(self, stream: Stream) -> None:
        if stream.group is not None:
            cancel(self.engine, [text.request for text in stream.group.texts])

    def stepped(self, tokens: Sequence[tuple[Token, bool]], ended: Sequence[Request]) -> None:
        """Of the engine's listener."""
        self._reader.submit(self._guarded, partial(self._read, tokens, ended))

    def failed(self, error: BaseException) -> None:
        """Of the engine's listener."""
        self._reader.submit(self._fail, error, list(self._texts))

    # ---- in the reader's thread --------------------------------------------------------------------------------

    def _guarded(self, act: Callable[[], None]) -> None:
        """Whatever goes wrong here reaches the consumers, who would wait for ever."""
        try:
            act()
        except BaseException as error:
            self._fail(ordinary(error), list(self._texts))

    def _read(self, tokens: Sequence[tuple[Token, bool]], ended: Sequence[Request]) -> None:
        grown: set[Stream] = set()
        for token, last in tokens:
            if (found := self._texts.get(token.request.id)) is not None:
                stream, text = found
                grown.add(stream)
                if text.feed(token, last) and not last:
                    self._thread.call(partial(stop, self.engine, text))
                if last:
                    del self._texts[token.request.id]
        for request in ended:
            if (found := self._texts.pop(request.id, None)) is not None:
                stream, text = found
                text.end()
                grown.add(stream)
        wake(grown)

    def _fail(self, error: BaseException, request_ids: Iterable[int]) -> None:
        """Only these fail: the engine's thread may have begun others meanwhile."""
        found = [self._texts.pop(request_id, None) for request_id in request_ids]
        streams = {stream for stream, _ in filter(None, found)}
        for stream in streams:
            assert stream.group is not None
            stream.group.error = error
        wake(streams)

    # ---- looking, and the end ----------------------------------------------------------------------------------

    async def metrics(self) -> RunMetrics:
        """What the engine did so far."""
        return await asyncio.wrap_future(self._thread.call(self.engine.metrics))

    async def shutdown(self) -> None:
        """Idempotent: waits for the step under way, ends what is unfinished with SessionClosed, frees the model."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """`shutdown` for those who may wait."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._thread.stop()
            error = SessionClosed("the engine was closed before this request was finished; make a new one")
            self.failed(error)
            self._reader.shutdown()
            self.engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.shutdown()


def wake(streams: Iterable[Stream]) -> None:
    """Let consumers look, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in streams:
        loops.setdefault(stream.loop, []).append(stream)
    for loop, waiting in loops.items():
        try:
            loop.call_soon_threadsafe(ready, waiting)
        except RuntimeError:  # the loop is closed, and nobody reads any more
            continue


def ready(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream.ready.set()
