"""What the machine could do at best; `peers/machine.py` has the loops that measure it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

TIMES = 7


@dataclass(frozen=True)
class Bounds:
    """Of one moment: bytes per second of reading, operations per second on `dtype`, and by what these were done."""

    read_bytes_per_s: float
    flops_per_s: float
    dtype: str
    library: str
    threads: int


@dataclass(frozen=True)
class Loops:
    """How to measure: `read` gives the seconds of reading `size` bytes once, `compute` gives operations per second."""

    size: int
    read: Callable[[], float]
    compute: Callable[[], float]
    dtype: str
    library: str
    threads: int

    def measure(self) -> Bounds:
        """Medians of a few runs of each, taken in turns; takes a fraction of a second."""
        runs = [(self.read(), self.compute()) for _ in range(TIMES)]
        read, computed = (statistics.median(values) for values in zip(*runs, strict=True))
        return Bounds(self.size / read, computed, self.dtype, self.library, self.threads)
