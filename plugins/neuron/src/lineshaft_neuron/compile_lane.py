"""The lane of torch.compile: one program for each graph, of static shapes, by the Dynamo backend that is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo
from torch import fx

from lineshaft_contract.errors import ContractViolation
from lineshaft_neuron.lanes import Compiled, Counts

Counted = Callable[[], AbstractContextManager[Any]]
"""Watches one compilation; what it gives has a `hit` afterwards: whether a cache had the program."""


class CompileLane:
    """Implements `lanes.Lane` by `torch.compile(fullgraph=True, dynamic=False)`.

    Each graph is compiled when it is given, by a first call over the examples; a call after that which Dynamo would
    compile anew is refused. Arrays that a program writes are written in place.
    """

    name = "compile"

    def __init__(self, device: torch.device, backend: str = "neuron") -> None:
        self.device, self.counts = device, Counts()
        self._backend, self._sealed = backend, False

    def compile(self, graph: fx.GraphModule, examples: Sequence[torch.Tensor], written: Sequence[int]) -> Compiled:
        if self._sealed:
            raise ContractViolation("a program is compiled after the warm-up; thaw the session first")
        made = torch.compile(graph, fullgraph=True, dynamic=False, backend=self._backend)
        made(*examples)
        self.counts.compiled += 1

        def run(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            with torch.compiler.set_stance("fail_on_recompile"):
                return made(*tensors)

        return run

    def seal(self) -> None:
        self._sealed = True

    def unseal(self) -> None:
        self._sealed = False

    def close(self) -> None:
        """Programs are freed with the last reference to them."""
