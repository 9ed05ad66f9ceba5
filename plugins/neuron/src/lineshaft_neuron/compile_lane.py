"""The lane of torch.compile: one program for each graph, of static shapes, by the Dynamo backend of the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch._dynamo
from torch import fx

from lineshaft_contract.errors import ContractViolation
from lineshaft_neuron.caching import CompileCache, Lookup
from lineshaft_neuron.lanes import Compiled, Counts


class CompileLane:
    """Implements `lanes.Lane` by `torch.compile(fullgraph=True, dynamic=False)`.

    A graph is compiled when it is given, by a call over its examples; what Dynamo would compile after that is refused.
    Arrays that a program writes are written in place.
    """

    name = "compile"

    def __init__(self, device: torch.device, cache: CompileCache | None = None) -> None:
        """`cache` is where the vendor keeps programs, None where nothing is kept."""
        self.device, self.counts = device, Counts()
        self._cache, self._sealed = cache, False

    def compile(self, graph: fx.GraphModule, examples: Sequence[torch.Tensor], written: Sequence[int]) -> Compiled:
        """As in `Lane`. Raises ContractViolation once sealed, and for what the device does not compile."""
        if self._sealed:
            raise ContractViolation("a program would be compiled after warm-up; thaw the session first")
        made = torch.compile(graph, fullgraph=True, dynamic=False, backend=self.device.type)
        with self._cache.counted() if self._cache else nullcontext(Lookup()) as lookup:
            try:
                made(*examples)
            except torch._dynamo.exc.Unsupported as error:
                raise ContractViolation(f"a program is no single graph: {' '.join(str(error).split())}") from error
            self.synchronize()  # what compiles in the background is in the cache then
        self.counts.compiled += 1
        self.counts.cached += lookup.hit

        def run(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            with _refused_recompilation(), torch.compiler.set_stance("fail_on_recompile"):
                outputs: Sequence[torch.Tensor] = made(*tensors)
                return outputs

        return run

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        getattr(torch, self.device.type).synchronize()

    def seal(self) -> None:
        self._sealed = True

    def unseal(self) -> None:
        self._sealed = False

    def close(self) -> None:
        """Programs go with the last reference to them."""


@contextmanager
def _refused_recompilation() -> Iterator[None]:
    """Dynamo's refusal to compile anew becomes a ContractViolation."""
    try:
        yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise ContractViolation(
            "a program was called with tensors that it was not compiled for; every step has to be one of the buckets"
        ) from error
