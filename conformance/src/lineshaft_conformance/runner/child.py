"""The parent's end of one child process: asks it, waits for its answer, and tells how it ended if it did."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from lineshaft_conformance.runner.attempt import SUITE, place

Message = dict[str, Any]
CLOSE_SECONDS = 5.0
"""How long a child may take to close its backend before it is killed."""
GRACE_SECONDS = 10.0
"""How long after its time limit a child is killed; by then it should have told where it is and ended by itself."""
TAIL = 1 << 16
"""Bytes at the end of a dead child's output that are looked at."""
LAST_WORDS = 300
"""Characters of a dead child's output that are quoted."""
OVERDUE = re.compile(r"Timeout \(\d+:\d\d:\d\d[.\d]*\)!$", re.MULTILINE)
"""What the interpreter writes when a request runs into its limit, after whatever was printed without a line's end."""
FLOOD = 64 << 20
"""Bytes of output that are kept; a plugin that prints without end does not fill the disk."""
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)


class Child:
    """One process; `config` is what it is told first. It answers one request at a time, with a message of one key:
    "done", "failed" with a reason, "raised" with an error for the user, or "lost" with how the process ended."""

    def __init__(self, config: Mapping[str, Any], threads: int, scratch: str) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        read, self._requests = os.pipe()
        self._replies, write = os.pipe()
        lifeline, self._lifeline = os.pipe()
        command = [sys.executable, "-u", "-P", "-m", "lineshaft_conformance.runner.worker"]
        self.process = subprocess.Popen(
            [*command, str(read), str(write), str(lifeline)],
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
            pass_fds=(read, write, lifeline), process_group=0, env=environment(threads, scratch),
        )  # fmt: skip
        for number in (read, write, lifeline):
            os.close(number)
        os.set_blocking(self._replies, False)
        self._buffer = b""
        self._status: int | None = None
        self._kept, self._said = b"", ""
        self._limit, self._deadline = 0.0, math.inf
        self._send(config)

    def fileno(self) -> int:
        return self._replies

    def ask(self, request: Mapping[str, Any], limit: float) -> None:
        """Send a request that is to be answered within `limit` seconds."""
        self._limit, self._deadline = limit, time.monotonic() + limit + GRACE_SECONDS
        self._shorten()
        self._kept = b""
        self._send({**request, "limit": limit})

    def _shorten(self) -> None:
        """Keep but the end of what it printed. It shares the position in the file, so that its output starts anew."""
        self._kept = self._tail()
        self._output.seek(0)
        self._output.truncate()

    def _tail(self) -> bytes:
        start = max(0, os.fstat(self._output.fileno()).st_size - TAIL)
        return self._kept[-TAIL:] + os.pread(self._output.fileno(), TAIL, start)

    def _send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead; `answer` will say how
            os.write(self._requests, json.dumps(message).encode() + b"\n")

    def answer(self) -> Message | None:
        """What it answered, or None as long as it works. Does not wait."""
        ended = self._exited()
        if not ended and os.fstat(self._output.fileno()).st_size > FLOOD:
            self._shorten()
        try:
            while part := os.read(self._replies, 1 << 16):
                self._buffer += part
            ended = True  # the other end is closed
        except BlockingIOError:
            pass
        line, newline, rest = self._buffer.partition(b"\n")
        if newline:
            self._buffer = rest
            return self._parsed(line)
        if ended:
            status = self.end(CLOSE_SECONDS)
            return self._lost(self._overdue if OVERDUE.search(self._said) else how(status))
        if time.monotonic() > self._deadline:
            self.end()
            return self._lost(self._overdue)
        return None

    @property
    def _overdue(self) -> str:
        return f"still running after {self._limit:g} s"

    def _parsed(self, line: bytes) -> Message:
        try:
            message = json.loads(line)
            if isinstance(message, dict):
                return message
        except ValueError:
            pass
        self.end()
        return self._lost(f"wrote {line[:80]!r} where only the suite's answers go")

    def _exited(self) -> bool:
        """Whether it has ended; it stays a zombie, so that its process group keeps its id."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _lost(self, reason: str) -> Message:
        return {"lost": f"{reason}{last_words(self._said)}"}

    def close(self) -> None:
        """Let it close its backend, then end it and all processes that it started."""
        if self._status is None:
            os.close(self._requests)
            self._requests = os.open(os.devnull, os.O_WRONLY)
            self.end(CLOSE_SECONDS)

    def end(self, patience: float = 0.0) -> int:
        """Wait `patience` seconds, then kill it with all processes that it started. Returns its status; idempotent."""
        if self._status is not None:
            return self._status
        until = time.monotonic() + patience
        while not self._exited() and time.monotonic() < until:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # it may have joined another group
        self._status = self.process.wait()
        self._said = self._tail().decode(errors="replace")
        for number in (self._requests, self._replies, self._lifeline):
            os.close(number)
        self._output.close()
        return self._status


def how(status: int) -> str:
    """What an exit status says."""
    if status >= 0:
        return f"ended the process with status {status}"
    return f"killed the process: signal {-status} ({signal.strsignal(-status)})"


def environment(threads: int, scratch: str) -> dict[str, str]:
    """A child's environment: the parent's modules, this many threads for each library unless the user says so, and a
    folder for temporary files, which the parent removes even where the child is killed."""
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**dict.fromkeys(pools, str(threads)), **os.environ, "PYTHONPATH": path, "TMPDIR": scratch}


def last_words(output: str) -> str:
    """Where a child was and what it printed, from its output; "" if that says nothing."""
    printed, blocks = re.split(rf"^Fatal Python error:|{OVERDUE.pattern}", output, maxsplit=1, flags=re.MULTILINE), []
    if len(printed) > 1:
        blocks = [block for block in printed[1].split("\n\n") if "most recent call first" in block]
    stack = max(blocks, key=lambda block: ("Current thread" in block, "runner/worker.py" in block), default="")
    frames = [frame for frame in FRAME.findall(stack) if not frame[0].startswith(str(SUITE))]
    at = f" (in {place(frames[0][0], int(frames[0][1]), frames[0][2])})" if frames else ""
    said = " ".join(printed[0].split())[-LAST_WORDS:]
    return f"{at}; last output: {said!r}" if said else at
