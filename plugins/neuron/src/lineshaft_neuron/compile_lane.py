"""The lane of torch.compile: one program for each graph, of static shapes, by the Dynamo backend of the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import fx
from torch._dynamo import exc

from lineshaft_contract.errors import BackendUnavailable, ContractViolation, LineshaftError
from lineshaft_neuron.caching import CompileCache, Lookup
from lineshaft_neuron.lanes import Compiled, Counts, shapes


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
        """As in `Lane`. Raises ContractViolation once sealed, and for what the device does not compile;
        BackendUnavailable where its compiler fails."""
        if self._sealed:
            raise ContractViolation("a program would be compiled after warm-up; thaw the session first")
        made = torch.compile(graph, fullgraph=True, dynamic=False, backend=self.device.type)
        with self._cache.counted() if self._cache else nullcontext(Lookup()) as lookup:
            with _refusals(examples):
                made(*examples)
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
def _refusals(examples: Sequence[torch.Tensor]) -> Iterator[None]:
    """What Dynamo and the device's compiler raise, as errors of the contract."""
    try:
        yield
    except LineshaftError:
        raise
    except exc.BackendCompilerFailed as error:
        raise BackendUnavailable(
            f"the device's compiler failed for {shapes(examples)} ({_line(error)}); set other compiler_flags, or "
            "another bucket table"
        ) from error
    except exc.TorchDynamoException as error:
        raise ContractViolation(f"a program is no single graph: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.500}"


@contextmanager
def _refused_recompilation() -> Iterator[None]:
    """Dynamo's refusal to compile anew becomes a ContractViolation."""
    try:
        yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        reason = " ".join(str(error).partition("guard failure(s):")[2].split()) or "PyTorch does not say why"
        raise ContractViolation(
            f"a program would be compiled anew ({reason:.300}); every step has to be one of the buckets, and PyTorch's "
            "threads, precision and modes have to stay what they were when it was compiled"
        ) from error
