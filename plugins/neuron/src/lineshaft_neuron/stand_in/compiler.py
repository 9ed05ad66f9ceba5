"""The Dynamo backend of the stand-in: checks a program by the rules of the device, then runs it on the host's memory.

Owns the count of what was compiled, and the seal that ends compilation. Knows no session, model or bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch.utils import _pytree as pytree

from lineshaft_contract.errors import ContractViolation
from lineshaft_neuron.stand_in.device import NAME, on_device, on_host
from lineshaft_neuron.stand_in.rules import Rejected, check

SHOWN = 4
"""How many inputs a message describes."""


@dataclass
class Counts:
    """compiled      programs
    recompiled    calls for a function that had been compiled before: for another shape, or a guard that failed
    graph_breaks  those that Dynamo has counted in this process since the compiler was made, refusals included
    """

    compiled: int = 0
    recompiled: int = 0
    graph_breaks: int = 0


class StandInCompiler:
    """A backend of torch.compile that holds programs to what the device compiles, and runs them on the CPU.

    `torch.compile(fn, fullgraph=True, dynamic=False, backend=StandInCompiler())`; the one that `start` registers goes
    by the name "neuron". A program takes tensors on the device and returns tensors on the device; what it writes in
    place is written where it lies. An output is fresh memory, but for one that is an input or a view of one.
    """

    def __init__(self) -> None:
        self._counts = Counts()
        self._sealed = False
        self._breaks_before = _graph_breaks()

    @property
    def counts(self) -> Counts:
        """What was compiled so far."""
        self._counts.graph_breaks = max(0, _graph_breaks() - self._breaks_before)
        return self._counts

    def seal(self) -> None:
        """From now on nothing compiles: what would, raises Rejected."""
        self._sealed = True

    def unseal(self) -> None:
        """Programs may be compiled again."""
        self._sealed = False

    def __call__(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """A callable of the graph's inputs. Raises Rejected."""
        self._counts.recompiled += _is_recompilation()
        if self._sealed:
            raise Rejected(
                f"nothing is compiled after warm-up, and no compiled program takes {_described(examples)}; run shapes "
                "that were compiled, or unseal()"
            )
        check(graph, examples)
        program = Program(_for_host(graph), examples)
        self._counts.compiled += 1
        return program


class Program:
    """A compiled program: the graph itself, on the host's memory behind the tensors of the device."""

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Any]) -> None:
        self._forward = graph.forward
        self._specs = [_spec(example) for example in examples]

    def __call__(self, *inputs: Any) -> Any:
        """Raises ContractViolation for inputs of another shape, dtype or device than it was compiled for."""
        if [_spec(item) for item in inputs] != self._specs:
            raise ContractViolation(
                f"a program compiled for {_listed(self._specs)} was called with {_described(inputs)}"
            )
        hosts = [on_host(item) if isinstance(item, torch.Tensor) else item for item in inputs]
        given = {id(host): item for host, item in zip(hosts, inputs, strict=True)}

        def returned(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            return given[id(item)] if id(item) in given else on_device(item)

        with torch.autocast("cpu", enabled=False):  # dtypes are those of the compiled program
            return pytree.tree_map(returned, self._forward(*hosts))


def _for_host(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in which the host stands where the device is named, and constants lie there."""
    copied = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        copy = copies[node] = copied.node_copy(node, copies.__getitem__)
        if node.op.startswith("call"):
            copy.args = fx.node.map_aggregate(copy.args, _host_for_device)
            copy.kwargs = fx.node.map_aggregate(copy.kwargs, _host_for_device)
    constants = {node.target: on_host(attrgetter(node.target)(graph)) for node in copied.find_nodes(op="get_attr")}
    return fx.GraphModule(constants, copied)


def _host_for_device(value: Any) -> Any:
    named = value.type if isinstance(value, torch.device) else value
    return torch.device("cpu") if named in (NAME, f"{NAME}:0") else value


def _is_recompilation() -> bool:
    """Whether Dynamo compiles a function that it has compiled before; outside of Dynamo nothing is."""
    compilation = CompileContext.current_compile_id()
    return compilation is not None and bool(compilation.frame_compile_id)


def _graph_breaks() -> int:
    return sum(counters["graph_break"].values())


def _spec(item: Any) -> Any:
    return (item.shape, item.dtype, item.device.type) if isinstance(item, torch.Tensor) else item


def _described(inputs: Sequence[Any]) -> str:
    return _listed([_spec(item) for item in inputs])


def _listed(specs: Sequence[Any]) -> str:
    shown = [
        f"{str(spec[1]).removeprefix('torch.')}{list(spec[0])}" if isinstance(spec, tuple) else repr(spec)
        for spec in specs[:SHOWN]
    ]
    return ", ".join(shown) + (f" and {len(specs) - SHOWN} inputs more" if len(specs) > SHOWN else "")
