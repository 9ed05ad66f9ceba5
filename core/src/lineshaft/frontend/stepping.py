"""The thread that owns an engine: it steps while there is work, and what else touches the engine runs between steps.

Knows no text and no event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Condition, Thread
from typing import Any, NoReturn, Protocol, TypeVar

from lineshaft.engine import Engine
from lineshaft.errors import SessionClosed
from lineshaft.flight import Token
from lineshaft.frontend.group import cancel, marked
from lineshaft.scheduler import Request

T = TypeVar("T")


class Listener(Protocol):
    """What is told of each step, in the engine's thread: it should do no more than hand it on."""

    def stepped(self, tokens: Sequence[tuple[Token, bool]], ended: Sequence[Request]) -> None:
        """The tokens, each with whether it is its request's last, and the requests that ended without one."""

    def failed(self, error: BaseException) -> None:
        """The step raised; all watched requests are cancelled."""


class EngineThread(Thread):
    """Start it, `call` what touches the engine, and `stop` it; the engine stays open."""

    def __init__(self, engine: Engine, listener: Listener) -> None:
        super().__init__(name="lineshaft-engine", daemon=True)
        self._engine, self._listener = engine, listener
        self._acts: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = Condition()
        self._stopping = False
        self._watched: dict[int, Request] = {}

    def call(self, act: Callable[[], T]) -> Future[T]:
        """Run something between two steps. After `stop` its future raises SessionClosed."""
        future: Future[T] = Future()
        with self._changed:
            if self._stopping:
                self._act(future, refuse)
            else:
                self._acts.append((future, act))
                self._changed.notify()
        return future

    def watch(self, requests: Sequence[Request]) -> None:
        """Tell the listener of the end of these, too, where no token brings it. For use inside a call."""
        self._watched.update({request.id: request for request in requests})

    def stop(self) -> None:
        """End after the step under way; what was to be called and is not yet raises SessionClosed."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while self._wait():
            while self._acts:
                self._act(*self._acts.popleft())
            if not self._stopping:
                self._step()
        for future, _ in self._acts:
            self._act(future, refuse)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False where that is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._acts or self._engine.has_work)
            return not self._stopping

    def _act(self, future: Future[Any], act: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(act())
        except Exception as error:
            future.set_exception(error)

    def _step(self) -> None:
        try:
            tokens = list(marked(self._engine.step())) if self._engine.has_work else []
        except Exception as error:
            self._fail(error)
            return
        for token, last in tokens:
            if last:
                self._watched.pop(token.request.id, None)
        ended = [request for request in self._watched.values() if request.finished]
        for request in ended:
            del self._watched[request.id]
        if tokens or ended:
            self._listener.stepped(tokens, ended)

    def _fail(self, error: Exception) -> None:
        """Cancel everything: the next step is the next request's. One that fails and serves nobody is the last."""
        requests = list(self._watched.values())
        self._watched.clear()
        self._listener.failed(error)
        with suppress(Exception):
            cancel(self._engine, requests)
        self._stopping = self._stopping or not requests


def refuse() -> NoReturn:
    raise SessionClosed("the engine is closed; make a new one")
