"""From a function over device tensors to a flat graph of torch calls, in which every tensor that it reads is an input.

The function runs once, over fakes: nothing is computed, and what Python it is made of leaves no trace, so that the
graph is the same on all ranks. Knows no session, no kernel and no compiler.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lineshaft_contract.errors import ContractViolation
from lineshaft_torch.arena import Lifetime, plan_offsets
from lineshaft_torch.tensors import storage_key, storage_keys, tensors_in

Updates = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(what holds a value, its new value)."""

TO_NUMPY = ("numpy", "__array__")

Result = tuple[Mapping[str, torch.Tensor], Updates]


@dataclass(frozen=True)
class Traced:
    """A traced function.

    graph    placeholders, calls, and a tuple of outputs
    held     the tensors that the function found besides those it was given: a placeholder each, after those
    written  numbers of the placeholders that the graph changes in place
    outputs  names of the outputs, in their order
    """

    graph: fx.GraphModule
    held: tuple[torch.Tensor, ...]
    written: tuple[int, ...]
    outputs: tuple[str, ...]

    @cached_property
    def workspace(self) -> int:
        """Bytes of intermediate results, outputs among them, that live at once, each until it is last read."""
        given: set[int] = set()
        lives: dict[int, Lifetime] = {}
        for at, node in enumerate(self.graph.graph.nodes):
            made = [] if node.op == "output" else _values(node)
            if node.op == "placeholder":
                given |= storage_keys(made)
            for tensor in (*made, *(read for before in node.all_input_nodes for read in _values(before))):
                if (key := storage_key(tensor)) not in given:
                    lives.setdefault(key, Lifetime(tensor.untyped_storage().nbytes(), at, at)).last = at
        return plan_offsets(list(lives.values()))[1]

    @property
    def digest(self) -> str:
        """sha256 of all that the graph computes, and over which shapes and dtypes: equal on all ranks of a run."""
        shapes = [_described(node.meta["val"]) for node in self.graph.graph.nodes if node.op == "placeholder"]
        return hashlib.sha256(f"{shapes}\n{self.graph.code}".encode()).hexdigest()

    def calls(self, namespace: str) -> list[str]:
        """Names of the operators of a namespace of torch that the graph calls, in order."""
        targets = [str(node.target) for node in self.graph.graph.nodes if node.op == "call_function"]
        return [target.split(".")[1] for target in targets if target.startswith(f"{namespace}.")]


def trace(run: Callable[[], Result], given: Sequence[torch.Tensor]) -> Traced:
    """The graph of `run`, which takes no arguments and reads the tensors `given`, and any others that it holds.

    `run` returns its outputs by name, and updates of tensors that it holds, which the graph makes at its end. It has to
    compute by torch alone; a tensor that it makes of values of its own is refused. Raises ContractViolation.
    """
    tracer = Tracer()
    for tensor in given:
        tracer.fake(tensor)
    with tracer:
        outputs, updates = run()
        for old, new in updates:
            if old is not new:
                old.copy_(new)
        made = {name: tracer.fresh(tensor) for name, tensor in outputs.items()}
    tracer.graph.output(tuple(tracer.node(tensor) for tensor in made.values()))
    merge_equal(tracer.graph)
    graph = fx.GraphModule(torch.nn.Module(), tracer.graph)
    return Traced(graph, tuple(tracer.real[len(given) :]), tracer.written(), tuple(made))


def merge_equal(graph: fx.Graph) -> None:
    """Compute once what is computed alike several times, as masks are in every layer, and leave out what nobody reads.

    Calls that write in place, or read what is ever written in place, stay as they are.
    """
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op.startswith("call") and _constant(node):
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
    for node in reversed(graph.nodes):
        if node.op.startswith("call") and not node.users and _constant(node):
            graph.erase_node(node)


def _constant(node: fx.Node) -> bool:
    """Whether nothing that a call takes or gives is ever written in place."""
    return all(tensor._version == 0 for part in (node, *node.all_input_nodes) for tensor in _values(part))


def _values(node: fx.Node) -> list[torch.Tensor]:
    """What a node gives, while tracing."""
    return tensors_in(node.meta["val"])


class Tracer(TorchFunctionMode):
    """Records every call of torch in `graph`; `real` are the tensors behind its placeholders."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.real: list[torch.Tensor] = []
        self._mode = FakeTensorMode()
        self._fakes: dict[int, torch.Tensor] = {}  # by the identity of what is real
        self._nodes: dict[int, tuple[torch.Tensor, fx.Node]] = {}  # by the identity of a fake, which lives as long
        self._inputs: list[torch.Tensor] = []  # the fakes behind the placeholders
        self._last: fx.Node | None = None  # placeholder

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake of a tensor: itself if it is one, else that of its placeholder."""
        if isinstance(tensor, FakeTensor):
            if id(tensor) not in self._nodes:
                raise ContractViolation(
                    f"a forward uses a tensor of shape {list(tensor.shape)} that comes from no call of torch, no "
                    "weight and no input; a program that is compiled once computes by torch alone"
                )
            return tensor
        if id(tensor) not in self._fakes:
            with self._mode, torch._C.DisableTorchFunction():  # the graph does not make it
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            self._fakes[id(tensor)] = made
            self.real.append(tensor)
            self._inputs.append(made)
            self._place(made)
        return self._fakes[id(tensor)]

    def _place(self, made: torch.Tensor) -> None:
        """A placeholder, after those that are there."""
        first = next(iter(self.graph.nodes), None)
        before = self.graph.inserting_after(self._last) if self._last else self.graph.inserting_before(first)
        with before:
            node = self._last = self.graph.placeholder(f"input_{len(self._inputs) - 1}")
        self._note(made, node)

    def _note(self, made: torch.Tensor, node: fx.Node) -> None:
        node.meta["val"] = made
        self._nodes.setdefault(id(made), (made, node))

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """Where the graph has a fake."""
        return self._nodes[id(tensor)][1]

    def fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """An output as a contiguous array, which is what programs are compiled for: a copy of it where it lies in the
        memory of an input."""
        borrowed = storage_key(self.fake(tensor)) in storage_keys(self._inputs)
        made = tensor.clone(memory_format=torch.contiguous_format) if borrowed else tensor.contiguous()
        return self.fake(made)

    def written(self) -> tuple[int, ...]:
        """Numbers of the placeholders whose memory was written."""
        return tuple(number for number, held in enumerate(self._inputs) if held._version)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.fake, (args, kwargs or {}))
        with self._mode, _refusals(func, (args, kwargs)):
            result = func(*args, **kwargs)
        if any(id(item) not in self._nodes for item in tensors_in(result)) or _in_place(func, kwargs):
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.node, (args, kwargs))
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property
            node = self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        elif getattr(torch.Tensor, name, None) == func:
            node = self.graph.call_method(name, args, kwargs)
        else:
            node = self.graph.call_function(func, args, kwargs)
        node.meta["val"] = result
        if isinstance(result, torch.Tensor):
            self._note(result, node)
            return
        for number, item in enumerate(result or ()):
            self._note(item, self.graph.call_function(operator.getitem, (node, number)))


@contextmanager
def _refusals(func: Any, given: Any) -> Iterator[None]:
    """What no tracing can do becomes a ContractViolation that says what to do; other errors stay as they are."""
    name = getattr(func, "__name__", str(func))
    try:
        yield
    except RuntimeError as error:
        if name in TO_NUMPY or isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            raise ContractViolation(
                f"a forward calls {name}, whose result, or the shape of it, depends on values; a program is traced "
                "before there are any: keep to tensors of fixed shapes, by torch.where, masks and topk"
            ) from error
        devices = sorted({str(leaf.device) for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)})
        if len(devices) > 1:
            raise ContractViolation(
                f"a forward calls {name} with tensors on {' and '.join(devices)}; make a tensor on the device of those "
                "that the forward is given, or load it as a weight"
            ) from error
        raise


def _in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes to a tensor that it is given."""
    name = getattr(func, "__name__", "")
    own = name == "__setitem__" or (name.startswith("__i") and name not in ("__int__", "__index__", "__invert__"))
    return own or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"
