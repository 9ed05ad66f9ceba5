"""How much memory this process may use: the machine's, or its control group's where that is less."""

from __future__ import annotations

from pathlib import Path

from lineshaft_contract.problems import KVProblem

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class HostMemory:
    """Implements `lineshaft_contract.sessions.Memory`; `meminfo` and `cgroup` are where Linux tells."""

    def __init__(self, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> None:
        self._meminfo, self._cgroup = meminfo, cgroup

    def total_free(self) -> tuple[int, int] | None:
        """(total, free) bytes, or None where the system does not tell."""
        machine = self._machine()
        if machine is None:
            return None
        total, free = machine
        limit, used = self._limit()
        return (total, free) if limit is None else (min(total, limit), max(0, min(free, limit - used)))

    def page_bytes(self, problem: KVProblem) -> int:
        return problem.page_bytes

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def _machine(self) -> tuple[int, int] | None:
        try:
            lines = dict(line.split(":", 1) for line in self._meminfo.read_text().splitlines() if ":" in line)
            return _kib(lines["MemTotal"]), _kib(lines["MemAvailable"])
        except (OSError, KeyError, ValueError):
            return None

    def _limit(self) -> tuple[int | None, int]:
        """The control group's limit (None: none) and its use without reclaimable file pages, versions 2 and 1."""
        v2 = (self._cgroup / "memory.max", self._cgroup / "memory.current", self._cgroup / "memory.stat")
        folder = self._cgroup / "memory"
        v1 = (folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes", folder / "memory.stat")
        for limit, usage, stat in (v2, v1):
            maximum, used = _number(limit), _number(usage)
            if maximum is not None and used is not None:
                return maximum, max(0, used - _inactive_file(stat))
        return None, 0


def _kib(value: str) -> int:
    return int(value.split()[0]) * 1024


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _inactive_file(path: Path) -> int:
    try:
        stat = dict(line.split() for line in path.read_text().splitlines())
        return int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0
