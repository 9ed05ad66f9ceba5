"""The threads that replay tapes: one team for each session, of as many threads as the process may use processors."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

from lineshaft_contract.errors import InvalidValue, OutOfMemory
from lineshaft_contract.host import usable_cpus
from lineshaft_cpu.engine.memory import no_threads
from lineshaft_cpu.native import Native

SPIN_NS = 10_000
"""How long a thread waits before it sleeps: longer costs whoever else needs the processor more than it saves."""
MOST = 1024
CGROUP = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def team_size(asked: int = 0, cgroup: Path = CGROUP, own: Path = OWN) -> int:
    """Threads of a team: as many as are asked for, or at 0 the processors that this process may run on and that its
    control group pays for; at least one.

    Raises InvalidValue for a number that no machine has.
    """
    if not 0 <= asked <= MOST:
        raise InvalidValue(f"threads = {asked}: allowed are 1 to {MOST}, or 0 for as many as there are processors")
    return asked or max(1, min(usable_cpus(), int(quota(cgroup, own) or MOST)))


def quota(cgroup: Path = CGROUP, own: Path = OWN) -> float | None:
    """Processors that the control group may use at once, versions 2 and 1, by the tightest of the groups that it lies
    in; None where none sets a limit.

    cgroup  where control groups are mounted
    own     the file that tells which ones this process is in
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    groups = {cgroup, cgroup / "cpu"}
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "" or "cpu" in controllers.split(","):
            root = cgroup / "cpu" if controllers else cgroup
            group = root / path.lstrip("/")
            groups |= {group, *(parent for parent in group.parents if parent.is_relative_to(root))}
    return min((limit for group in groups if (limit := limit_of(group))), default=None)


def limit_of(group: Path) -> float | None:
    """Processors that one control group may use at once; None where it sets no limit."""
    try:
        limit, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
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
            raise OutOfMemory(no_threads(threads))

    def submit(self, steps: int, count: int, scratch: int, scratch_bytes: int) -> None:
        """Begin a tape: `steps` is the address of `count` of them, `scratch` that of `scratch_bytes` for each thread.
        `wait` follows, before the next."""
        self._submit(self._team, steps, count, scratch, scratch_bytes)

    def wait(self) -> float:
        """Help with the tape until it is done; returns the seconds that it took. Again, it returns the same."""
        took: int = self._wait(self._team)
        return took / 1e9

    def close(self) -> None:
        """Wait for a tape under way, and end the threads. Idempotent."""
        team, self._team = self._team, None
        if team:
            self._stop(team)
