"""The end of the pipe on our side: starts an engine's driver in its environment and asks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lineshaft_bench.errors import PeerError
from lineshaft_bench.figures import Ran
from lineshaft_bench.workloads import Job

OURS = "lineshaft"
BOUNDS = "bounds"
"""The driver that measures the machine; no peer."""
FOLDER = Path(__file__).parent
PEERS = tuple(sorted({path.stem.removesuffix("_peer") for path in FOLDER.glob("*_peer.py")} - {BOUNDS}))


class Peer:
    """An engine in a process of its own. Use as a context manager; every failure is a PeerError with its reason."""

    def __init__(self, name: str, environment: Path | None, threads: int, log: Path) -> None:
        """`environment`: a virtual environment, or its interpreter; None: this one. `log` gets what it prints."""
        if name not in (*PEERS, BOUNDS):
            raise PeerError(f"peer {name!r}: known are {', '.join(PEERS)}")
        self.name, self._log = name, log
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        if environment is not None:
            variables = {key: value for key, value in variables.items() if not key.startswith("PYTHON")}
        command = [str(interpreter(name, environment)), str(FOLDER / f"{name}_peer.py")]
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
                )
        except OSError as error:
            raise PeerError(f"peer {name}: {command[0]}: {error.strerror}") from error

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """What the driver answers. Raises PeerError with the error that it met, or the end of what it printed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
            raise PeerError(f"peer {self.name}: its process ended at {do!r}: {last[0]}") from None
        if "error" in answer:
            raise PeerError(f"peer {self.name}: {do}: {answer['error']}")
        assert isinstance(answer, dict)
        return answer

    def run(self, jobs: Sequence[Job]) -> Ran:
        """Run a round; each job must get all its tokens."""
        stamps = self.ask("run", jobs=[job.to_json() for job in jobs])["stamps"]
        given, wanted = [len(times) for times in stamps], [job.out for job in jobs]
        if given != wanted:
            raise PeerError(f"peer {self.name}: it generated {sum(given)} tokens where {sum(wanted)} were asked for")
        return Ran(jobs, stamps)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interpreter(name: str, environment: Path | None) -> Path:
    """The python of an environment. Raises PeerError where there is none."""
    if environment is None:
        return Path(sys.executable)
    python = environment / "bin" / "python" if environment.is_dir() else environment
    if not python.is_file():
        raise PeerError(f"peer {name}: no interpreter at {python}; give --peer-env {name}=FOLDER of an environment")
    return python


def environments(texts: Mapping[str, str]) -> dict[str, Path]:
    """The folder of each peer's environment. Raises PeerError for a name that is no peer."""
    return {name: Path(path).expanduser() for name, path in of_peers("--peer-env", texts).items()}


def of_peers(option: str, texts: Mapping[str, str]) -> Mapping[str, str]:
    """What an option gives each peer. Raises PeerError for a name that is no peer."""
    for name in texts:
        if name not in PEERS:
            raise PeerError(f"{option} {name}: known are {', '.join(PEERS)}")
    return texts
