"""What is known of a Neuron core's memory, and whether the programs of a session fit into it."""

from __future__ import annotations

import torch

from lineshaft_contract.errors import OutOfMemory
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Memory
from lineshaft_contract.steps import StepShape


class CoreMemory:
    """Implements `lineshaft_contract.sessions.Memory` by torch.accelerator; None where the device does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total_free(self) -> tuple[int, int] | None:
        """(total, free) bytes."""
        try:
            free, total = torch.accelerator.get_memory_info(self._device)
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            return None
        return int(total), int(free)

    def page_bytes(self, problem: KVProblem) -> int:
        return problem.page_bytes

    def synchronize(self) -> None:
        getattr(torch, self._device.type).synchronize()


class Room:
    """Counts what the programs of a session keep for their intermediate results: each has room of its own on the
    device, for as long as it is loaded."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._free: int | None = None  # before the first program
        self._taken = 0

    def take(self, shape: StepShape, nbytes: int) -> None:
        """Count a program of `nbytes`. Raises OutOfMemory if those that are there leave too little."""
        if not self._taken and (found := self._memory.total_free()):
            self._free = found[1]
        taken = self._taken + nbytes
        if self._free is not None and taken > self._free:
            raise OutOfMemory(
                f"the bucket tables do not fit: with the program of {shape.tokens} tokens and {shape.rows} rows the "
                f"programs keep {_mib(taken)} for intermediate results, that one {_mib(nbytes)}, and "
                f"{_mib(self._free)} were free; leave large sizes out of prefill_buckets or decode_buckets under "
                "[backend_options], or lower cache.pages or max_model_len"
            )
        self._taken = taken


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
