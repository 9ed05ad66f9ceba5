"""What a lane is: a way from a traced program to one that runs. Knows no vendor's package and no session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

Compiled = Callable[..., Sequence[torch.Tensor]]
"""Takes the tensors of a program's placeholders, in order, and returns its outputs, in order."""


@dataclass
class Counts:
    """The programs that a lane has compiled, and those among them that a cache had."""

    compiled: int = 0
    cached: int = 0


class Lane(Protocol):
    """Compiles the programs of one session."""

    name: str
    device: torch.device  # where a session's tensors lie
    counts: Counts

    def compile(self, graph: fx.GraphModule, examples: Sequence[torch.Tensor], written: Sequence[int]) -> Compiled:
        """A program for exactly these shapes and dtypes.

        graph     flat: placeholders in order, calls of torch's functions and methods, a tuple of tensors as output
        examples  a tensor for each placeholder, on `device`: inputs first, then what the session holds
        written   numbers of the placeholders that the graph writes in place: caches, which programs share, so that a
                  call may be given others than the examples, but mostly is not
        """
        ...

    def seal(self) -> None:
        """From now on nothing compiles: what would, raises ContractViolation."""
        ...

    def unseal(self) -> None:
        """Programs may be compiled again."""
        ...

    def close(self) -> None:
        """Idempotent: free what the compiled programs hold."""
        ...


def shapes(tensors: Sequence[torch.Tensor]) -> str:
    """Dtypes and shapes, the first few of them."""
    told = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors[:6]]
    return ", ".join([*told, f"{len(tensors) - 6} more"] if len(tensors) > 6 else told)
