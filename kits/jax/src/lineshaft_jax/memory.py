"""What a rank may use of a device's memory, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from lineshaft_contract.problems import KVProblem
from lineshaft_jax.arrays import jax_dtype
from lineshaft_jax.kernels.pages import cache_specs
from lineshaft_jax.program import InFlight

Free = Callable[[], tuple[int, int] | None]


class RankMemory:
    """Implements `lineshaft_contract.sessions.Memory`; `free` tells (total, free), `lanes` pads the pages, `flight`
    has the steps that run."""

    def __init__(self, free: Free, lanes: int, flight: InFlight | None = None) -> None:
        self._free, self._lanes, self._flight = free, lanes, flight or InFlight()

    def total_free(self) -> tuple[int, int] | None:
        return self._free()

    def page_bytes(self, problem: KVProblem) -> int:
        specs = cache_specs(problem, 1, self._lanes).values()
        return sum(prod(shape) * jax_dtype(dtype).itemsize for shape, dtype in specs)

    def synchronize(self) -> None:
        """Wait until every step that was submitted is done."""
        self._flight.wait()


def device_memory(devices: list[Any]) -> tuple[int, int] | None:
    """(total, free) of the fullest device; None where the runtime does not tell."""
    stats = [device.memory_stats() for device in devices]
    if not all(stats):
        return None
    total = min(found["bytes_limit"] for found in stats)
    return total, min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
