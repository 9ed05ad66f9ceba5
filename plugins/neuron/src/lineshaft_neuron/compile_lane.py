"""The lane of torch.compile: one program for each graph, of static shapes, by the Dynamo backend of the device."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import fx
from torch._dynamo import exc

from lineshaft_contract.errors import BackendUnavailable, ContractViolation, LineshaftError
from lineshaft_neuron.caching import CompileCache, Lookup
from lineshaft_neuron.lanes import Compiled, Counts, shapes


class CompileLane:
    """Implements `lanes.Lane` by `torch.compile(fullgraph=True, dynamic=False)` with the backend of the device's name.

    A graph is compiled when it is given, by a call over its examples. Its guards are dropped: a flat graph depends on
    its arguments alone, whose shapes and dtypes the lane looks at itself, and not on what else a user sets in torch.
    What Dynamo would compile after the seal all the same is refused. What a program writes is written in place.
    """

    name = "compile"

    def __init__(self, device: torch.device, cache: CompileCache | None = None) -> None:
        """`cache` is where the vendor keeps programs, None where nothing is kept."""
        self.device, self.counts = device, Counts()
        self._cache, self._sealed = cache, False

    def compile(self, graph: fx.GraphModule, examples: Sequence[torch.Tensor], written: Sequence[int]) -> Compiled:
        """As in `Lane`. Raises ContractViolation once sealed, and for what the device does not compile;
        BackendUnavailable where its compiler fails."""
        self._require_unsealed()
        made = torch.compile(
            function_of(graph), fullgraph=True, dynamic=False, backend=self._backend,
            options={"guard_filter_fn": without_guards},
        )  # fmt: skip
        before = self.counts.compiled
        with self._cache.counted() if self._cache else nullcontext(Lookup()) as lookup:
            with _refusals(examples):
                made(None, *examples)
            self.synchronize()  # what compiles in the background is in the cache then
        assert self.counts.compiled == before + 1, "Dynamo took another graph's program for this one"
        self.counts.cached += lookup.hit
        specs = _specs(examples)

        def run(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            if _specs(tensors) != specs:
                raise ContractViolation(
                    f"a program was called with {shapes(tensors)}, or strides, for which it was not compiled; every "
                    "step has to be one of the buckets"
                )
            with _refusals(tensors):
                outputs: Sequence[torch.Tensor] = made(None, *tensors)
                return outputs

        return run

    def _backend(self, graph: fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., Any]:
        """The device's backend of torch.compile, until the lane is sealed."""
        self._require_unsealed()
        found: Callable[..., Any] = torch._dynamo.lookup_backend(self.device.type)(graph, examples)
        self.counts.compiled += 1
        return found

    def _require_unsealed(self) -> None:
        if self._sealed:
            raise ContractViolation("a program would be compiled after warm-up; thaw the session first")

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        getattr(torch, self.device.type).synchronize()

    def seal(self) -> None:
        self._sealed = True

    def unseal(self) -> None:
        self._sealed = False

    def close(self) -> None:
        """Programs go with the last reference to them."""


def _specs(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def function_of(graph: fx.GraphModule) -> FunctionType:
    """What a graph computes, as a function of its own that takes None before its arguments: Dynamo keeps programs by
    their code, and would trace a module's handling of errors in the place of an error."""
    shared = type(graph).forward
    linecache.getlines(shared.__code__.co_filename, shared.__globals__)  # Dynamo wraps a function without a source
    return FunctionType(shared.__code__.replace(), shared.__globals__)


def without_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to keep."""
    return [False] * len(guards)


@contextmanager
def _refusals(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """What Dynamo and the device's compiler raise, as errors of the contract."""
    try:
        yield
    except LineshaftError:
        raise
    except exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, LineshaftError):
            raise error.inner_exception from error
        raise BackendUnavailable(
            f"the device's compiler failed for {shapes(tensors)} ({_line(error)}); set other compiler_flags, or "
            "another bucket table"
        ) from error
    except exc.TorchDynamoException as error:
        raise ContractViolation(f"a program is no single graph: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.500}"
