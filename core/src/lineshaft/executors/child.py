"""The main program of a spawned worker: answers the engine's messages until the engine is gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from lineshaft.config import EngineConfig
from lineshaft.errors import LineshaftError
from lineshaft.executors.wire import Disconnected, receive, send
from lineshaft.runner.messages import ChoiceMessage, Frames, Settled, StepMessage
from lineshaft.runner.worker import Worker
from lineshaft_contract.sessions import HostArray


class Server:
    """Holds the worker, which `make` makes of a configuration, a rank and a rendezvous, and answers one call after the
    other."""

    def __init__(self, peer: socket.socket, make: Callable[[EngineConfig, int, str], Worker] = Worker) -> None:
        self._peer, self._make = peer, make
        self._worker: Worker | None = None
        self._failed = False

    def run(self) -> None:
        """Answer until the engine closes the connection."""
        try:
            while True:
                answer = self._answer(*receive(self._peer))
                if answer is not None:
                    send(self._peer, *answer)
        except Disconnected:
            pass
        finally:
            if self._worker is not None:
                self._worker.close()

    def _answer(self, header: dict[str, Any], arrays: list[HostArray]) -> Frames | None:
        """What to reply; None while a step runs, of which only the end, or a failure, is told. What follows a failure
        is not done."""
        if self._failed and header["call"] == "choose":
            return None
        try:
            return self._call(header, arrays)
        except Disconnected:
            raise
        except Exception as error:  # the engine raises it again; nothing is swallowed
            if not isinstance(error, LineshaftError):
                traceback.print_exc()
            message = " ".join(str(error).split())
            self._failed = True
            return {"error": {"class": type(error).__name__, "message": message}}, []

    def _call(self, header: dict[str, Any], arrays: list[HostArray]) -> Frames | None:
        if header["call"] == "make":
            config = EngineConfig.model_validate(header["config"])
            self._worker = self._make(config, header["rank"], header["rendezvous"])
            return {}, []
        assert self._worker is not None
        if header["call"] == "size":
            return self._worker.size(Settled.from_frames(header)).to_frames()
        if header["call"] == "start":
            return self._worker.start(tuple(header["pages"]), self._progress).to_frames()
        if header["call"] == "submit":
            self._worker.submit(StepMessage.from_frames(header, arrays))
            return None
        self._worker.choose(ChoiceMessage.from_frames(header, arrays))
        return self._worker.collect().to_frames()

    def _progress(self, what: str, done: int, total: int) -> None:
        send(self._peer, {"progress": [what, done, total]})


def watch(lifeline: int, folder: str) -> None:
    """End this process as soon as the engine's end of the pipe is gone, whatever the main thread is waiting for."""
    while os.read(lifeline, 1):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(arguments: Sequence[str] | None = None, make: Callable[[EngineConfig, int, str], Worker] = Worker) -> None:
    """`python -m lineshaft.executors.child SOCKET_FD LIFELINE_FD FOLDER`; Ctrl-C is the engine's business. The
    folder is too, unless the engine was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket_fd, lifeline, folder = sys.argv[1:] if arguments is None else arguments
    threading.Thread(target=watch, args=(int(lifeline), folder), daemon=True).start()
    try:
        Server(socket.socket(fileno=int(socket_fd)), make).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
