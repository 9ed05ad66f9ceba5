"""Command lines and worker processes as tests need them: started, awaited without sleeping, found if they stay."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

COMMAND = [sys.executable, "-c", "import sys; from lineshaft.cli.main import main; sys.exit(main())"]
SECONDS = 120.0
"""After this a command hangs."""


def environment(**more: str) -> dict[str, str]:
    """This process' environment with one thread for each worker, no other variable of lineshaft's, and `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LINESHAFT_")}
    return {**kept, "LINESHAFT_THREADS": "1", **more}


def lineshaft(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(**(env or {})), capture_output=True, text=True, timeout=SECONDS
    )


def start(*arguments: str, env: Mapping[str, str] | None = None, stdin: int | None = None) -> subprocess.Popen[str]:
    """Start the command line, its output in pipes."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(**(env or {})),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def assert_refused(done: subprocess.CompletedProcess[str], error: str, *words: str) -> None:
    """Assert exit status 2 and one line on stderr that names the error and these words, and nothing else."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"lineshaft: error: {error}: "), lines[0]
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""


class Watch:
    """Handles of processes, which tell of their end even when somebody else has to reap them; kills them at its end."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = list(pids)
        self._handles = [os.pidfd_open(pid) for pid in pids]

    @classmethod
    def children(cls, pid: int | None = None) -> Watch:
        """The children of a process (default: this one), with theirs."""
        return cls([child.pid for child in psutil.Process(pid).children(recursive=True)])

    def all_end(self, seconds: float) -> bool:
        """Wait for the end of all of them; False if one is left after these seconds."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for handle in self._handles:
                selector.register(handle, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    return False
                for key, _ in ready:
                    selector.unregister(key.fd)
        return True

    def close(self) -> None:
        """Kill what is left, so that a test that fails leaves no process either."""
        handles, self._handles = self._handles, []
        for handle in handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def folders_of(tmp: Path) -> list[Path]:
    """What lineshaft left in a folder for temporary files."""
    return sorted(tmp.glob("*lineshaft*"))
