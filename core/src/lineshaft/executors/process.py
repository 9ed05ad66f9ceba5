"""One spawned process per rank. A worker that dies is an error at once, one that hangs after `step_timeout_s`; none
outlives the engine."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lineshaft import errors
from lineshaft.config import EngineConfig
from lineshaft.errors import LineshaftError, SessionPoisoned, WorkerDied
from lineshaft.executors.base import size_alike
from lineshaft.executors.wire import Disconnected, receive, send
from lineshaft.registry import Registry
from lineshaft.runner.messages import ChoiceMessage, Settled, Sizes, Started, StepMessage, StepResult
from lineshaft.runner.setup import check_layout, degrees_of
from lineshaft.runner.worker import Progress
from lineshaft_contract.host import usable_cpus
from lineshaft_contract.sessions import HostArray

GONE_SECONDS = 0.2
"""How long to look, at each worker, whether it has ended."""
CLOSE_SECONDS = 5.0
"""How long all workers together may take to close before they are killed."""

WORKERS_PER_CPU = 8
"""Most workers for each CPU that this process may use: beyond that they only wait for each other."""

WORKER = ("lineshaft.executors.child",)
"""The module that a worker process runs, and the first of its arguments."""

Reply = tuple[dict[str, Any], list[HostArray]]


def most_workers() -> int:
    """Most worker processes of one engine on this machine."""
    return WORKERS_PER_CPU * usable_cpus()


@dataclass
class Child:
    """One worker process, the socket it talks through, and the pipe whose end tells it that the engine is gone."""

    rank: int
    process: subprocess.Popen[bytes]
    peer: socket.socket
    lifeline: int

    def stop(self, seconds: float) -> None:
        """Wait for the process to end by itself, then end it."""
        try:
            self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.lifeline)


class ProcessExecutor:
    """Ranks in processes; the engine talks to each over a socket pair. `worker` is what they run instead of core's own
    program: a module, and arguments that go before core's."""

    beside = True

    def __init__(self, config: EngineConfig, registry: Registry, worker: Sequence[str] = WORKER) -> None:
        check_layout(config, registry)
        self._degrees = degrees_of(config)
        self._folder = Path(tempfile.mkdtemp(prefix="lineshaft-"))
        self._children: list[Child] = []
        self._broken = ""
        self._asked = False  # whether a step is to be collected
        self._timeout = config.step_timeout_s
        try:
            for rank in range(self._degrees.world):
                self._children.append(spawn(rank, self._folder, self._timeout, worker))
            rendezvous = str(self._folder / "rendezvous")
            self._ask_all({"call": "make", "config": config.model_dump(mode="json"), "rendezvous": rendezvous})
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Whatever interrupts an exchange leaves replies under way that nothing could tell from later ones: from then
        on every call raises SessionPoisoned."""
        if self._broken:
            raise SessionPoisoned(f"an earlier step was interrupted ({self._broken}); make the engine anew")
        try:
            yield
        except BaseException as error:
            self._broken = type(error).__name__
            raise

    def size(self) -> list[Sizes]:
        def ask(settled: Settled) -> list[Sizes]:
            return [Sizes.from_frames(*reply) for reply in self._ask_all({"call": "size", **settled.to_frames()[0]})]

        return size_alike(ask)

    def start(self, pages: tuple[int, ...], progress: Progress) -> list[Started]:
        replies = self._ask_all({"call": "start", "pages": pages}, progress)
        shutil.rmtree(self._folder, ignore_errors=True)  # all have met
        return [Started.from_frames(*reply) for reply in replies]

    def submit(self, steps: Sequence[StepMessage]) -> None:
        if self._asked:
            self.collect()  # the engine gave that step up: its replies would be taken for this one's
        self._tell("submit", steps)

    def choose(self, choices: Sequence[ChoiceMessage]) -> None:
        self._asked = True
        self._tell("choose", choices)

    def collect(self) -> list[StepResult]:
        with self._exchange():
            replies = self._collect(None, self._timeout)
        self._asked = False
        return [StepResult.from_frames(*reply) for reply in replies[:: self._degrees.replica]]

    def _tell(self, call: str, messages: Sequence[StepMessage | ChoiceMessage]) -> None:
        """Send each replica's message to all of its workers; only what follows `choose` is answered."""
        replica_size = self._degrees.replica
        with self._exchange():
            for replica, message in enumerate(messages):
                header, arrays = message.to_frames()
                for child in self._children[replica * replica_size : (replica + 1) * replica_size]:
                    self._send(child, {"call": call, **header}, arrays)

    def close(self) -> None:
        """Idempotent: ends every worker, by force if it does not end by itself."""
        children, self._children = self._children, []
        for child in children:
            child.peer.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for child in children:
            child.stop(deadline - time.monotonic())
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- asking -------------------------------------------------------------------------------------------------

    def _ask_all(self, header: dict[str, Any], progress: Progress | None = None) -> list[Reply]:
        with self._exchange():
            for child in self._children:
                self._send(child, {**header, "rank": child.rank})
            return self._collect(progress)

    @contextmanager
    def _talking(self, child: Child) -> Iterator[None]:
        """What the socket raises says what became of the worker."""
        try:
            yield
        except TimeoutError as error:
            raise self._hung([child]) from error
        except Disconnected as error:
            raise self._died(child) from error

    def _send(self, child: Child, header: dict[str, Any], arrays: Sequence[HostArray] = ()) -> None:
        with self._talking(child):
            send(child.peer, header, arrays)

    def _collect(self, progress: Progress | None = None, timeout: float = math.inf) -> list[Reply]:
        """One reply of every worker; the first failure ends the wait, as the others may wait for the failed one."""
        replies: dict[int, Reply] = {}
        deadline = time.monotonic() + timeout
        while waiting := [child for child in self._children if child.rank not in replies]:
            ready = wait([child.peer for child in waiting], min(deadline - time.monotonic(), 3600.0))
            if not ready and time.monotonic() >= deadline:
                raise self._hung(waiting)
            for child in waiting:
                if child.peer in ready and (reply := self._take(child, progress)) is not None:
                    replies[child.rank] = reply
        return [replies[child.rank] for child in self._children]

    def _take(self, child: Child, progress: Progress | None) -> Reply | None:
        """A worker's reply; None where it only tells of its progress."""
        with self._talking(child):
            header, arrays = receive(child.peer)
        if "progress" in header:
            if progress is not None and child.rank == 0:
                progress(*header["progress"])
            return None
        if "error" in header:
            raise self._cause(rebuild_error(header["error"], child.rank))
        return header, arrays

    def _cause(self, error: BaseException) -> BaseException:
        """A worker's error, or the end of another one that it is about, as a collective noticed it first."""
        if isinstance(error, WorkerDied):
            for child in self._children:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(GONE_SECONDS)
                    return self._died(child)
        return error

    def _hung(self, silent: Sequence[Child]) -> WorkerDied:
        """Kills every worker: those that answered could only wait for the silent ones."""
        named = ", ".join(f"{child.rank} (process {child.process.pid})" for child in silent)
        for child in self._children:
            child.process.kill()
        self.close()
        return WorkerDied(
            f"no answer within step_timeout_s = {self._timeout:g} from rank {named}; all workers were killed, the "
            "engine must be made anew, with a longer step_timeout_s if a step may take so long"
        )

    def _died(self, child: Child) -> WorkerDied:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(CLOSE_SECONDS)
        status = child.process.returncode
        how = "closed its connection" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was killed by signal {-status}"
        return WorkerDied(
            f"worker of rank {child.rank} (process {child.process.pid}) {how}; what it printed is above, "
            "the engine must be made anew"
        )


def spawn(rank: int, folder: Path, timeout: float, worker: Sequence[str] = WORKER) -> Child:
    """Start one worker process; it waits for its first message. No message may stand still for longer than `timeout`
    seconds."""
    try:
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)
        lifeline_read, lifeline_write = os.pipe()
    except OSError as error:
        raise WorkerDied(
            f"worker of rank {rank} cannot be started ({error.strerror}): raise the limit of open files"
        ) from error
    command = [sys.executable, "-m", *worker, str(theirs.fileno()), str(lifeline_read), str(folder)]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), lifeline_read), start_new_session=True
        )
    finally:
        theirs.close()
        os.close(lifeline_read)
    return Child(rank, process, ours, lifeline_write)


def rebuild_error(described: dict[str, str], rank: int) -> LineshaftError:
    """A worker's error as the class it had there; an unknown class becomes WorkerDied."""
    kind = getattr(errors, described["class"], None)
    if isinstance(kind, type) and issubclass(kind, LineshaftError):
        return kind(described["message"])
    return WorkerDied(f"worker of rank {rank} failed: {described['class']}: {described['message']}")
