"""What this process may use of the machine that it runs on."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fair_share(workers: int) -> int:
    """CPUs for each of so many workers of this machine; at least one."""
    return max(1, usable_cpus() // workers)
