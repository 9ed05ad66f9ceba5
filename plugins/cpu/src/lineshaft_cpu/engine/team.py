"""The threads that replay tapes: one team for each session, of as many threads as the process may use processors."""

from __future__ import annotations

import os
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

from lineshaft_contract.errors import InvalidValue, OutOfMemory
from lineshaft_contract.host import usable_cpus
from lineshaft_cpu.native import Native

SPIN_NS = 10_000
"""How long a thread waits before it sleeps: longer costs whoever else needs the processor more than it saves."""
MOST = 1024
CGROUP = Path("/sys/fs/cgroup")


def team_size(asked: int = 0, cgroup: Path = CGROUP) -> int:
    """Threads of a team: as many as are asked for, or at 0 the processors that this process may run on and that its
    control group pays for; at least one.

    Raises InvalidValue for a number that no machine has.
    """
    if not 0 <= asked <= MOST:
        raise InvalidValue(f"threads = {asked}: allowed are 1 to {MOST}, or 0 for as many as there are processors")
    return asked or max(1, min(usable_cpus(), int(quota(cgroup) or MOST)))


def quota(cgroup: Path = CGROUP) -> float | None:
    """Processors that the control group may use at once, versions 2 and 1; None where it sets no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except ValueError:
        return None


class Team:
    """Threads of the library's own, which the caller joins while it waits. `close` ends them."""

    def __init__(self, native: Native, threads: int, spin_ns: int = SPIN_NS) -> None:
        """So many threads, the caller's among them. Raises OutOfMemory where the system gives no further thread."""
        self._submit = native.shared("submit", None, c_void_p, c_void_p, c_int64, c_void_p, c_int64)
        self._wait = native.shared("wait", c_int64, c_void_p)
        self._stop = native.shared("team_stop", None, c_void_p)
        self.threads = threads
        self._team = native.shared("team_start", c_void_p, c_int, c_int64)(threads, spin_ns)
        if not self._team:
            raise OutOfMemory(
                f"the system gives no team of {threads} threads (process {os.getpid()}); set threads to fewer, or "
                "raise the limit of processes (`ulimit -u`)"
            )

    def submit(self, steps: int, count: int, scratch: int, scratch_bytes: int) -> None:
        """Begin a tape: `steps` is the address of `count` of them, `scratch` that of `scratch_bytes` for each thread.
        `wait` follows, before the next."""
        self._submit(self._team, steps, count, scratch, scratch_bytes)

    def wait(self) -> float:
        """Help with the tape until it is done; returns the seconds that it took."""
        took: int = self._wait(self._team)
        return took / 1e9

    def close(self) -> None:
        """Idempotent; nothing may be under way."""
        team, self._team = self._team, None
        if team:
            self._stop(team)
