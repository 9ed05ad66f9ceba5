"""What the stand-in's compiler refuses: the operators that a program comes down to, looked at one by one, unrun.

Knows ATen's operators and fake tensors; compiles and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lineshaft_contract.errors import ContractViolation
from lineshaft_neuron.stand_in.device import NAME

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
WIDE = frozenset({torch.float64, torch.complex32, torch.complex64, torch.complex128})
UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
SORTS = frozenset({
    "sort", "msort", "argsort", "kthvalue", "median", "nanmedian", "mode", "quantile", "nanquantile", "searchsorted",
    "bucketize", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
})  # fmt: skip
COPIES = frozenset({"_to_copy", "copy_", "copy", "clone", "lift_fresh", "lift_fresh_copy", "alias", "detach"})
POSITIONS = frozenset({"argmax", "argmin", "topk", "max", "min"})
"""Operators that yield positions, int64 by torch's rule; a program converts them at once."""
CONSTANTS = frozenset({"lift_fresh", "lift_fresh_copy", "detach", "_to_copy"})
"""What torch.tensor(values, device=...) comes down to: it begins on the host."""
MODES = frozenset({
    torch.autograd.grad_mode._enter_inference_mode, torch.autograd.grad_mode._exit_inference_mode,
    torch._C._set_grad_enabled,
})  # fmt: skip
"""Calls in a graph that compute nothing, and would outlive a check that ends in between."""


class Rejected(ContractViolation, ShortenTraceback):
    """The stand-in does not compile a program; the message names the node, its source line and the reason.

    node    the node of the graph, None where the program as a whole is refused
    reason  without the place

    Dynamo lets it through as it is, since it is a ShortenTraceback; others it wraps into BackendCompilerFailed.
    """

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        message = f"program refused: {reason}" if node is None else f"program refused at {_place(node)}: {reason}"
        super().__init__(message, first_useful_frame=None)
        self.node, self.reason, self._message = node, reason, message

    def __str__(self) -> str:
        """The message alone: Dynamo adds to the arguments of an error how to debug Dynamo."""
        return self._message


def _place(node: fx.Node) -> str:
    """The node, what it calls, and the innermost source line that Dynamo noted."""
    called = f" ({node._pretty_print_target(node.target)})" if node.op.startswith("call") else ""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [number for number, line in enumerate(lines) if line.startswith("File ")]
    return f"node {node.name!r}{called}" + (f", {': '.join(lines[files[-1] : files[-1] + 2])}" if files else "")


def check(graph: fx.GraphModule, examples: Sequence[Any]) -> None:
    """Raises Rejected for a program that the device does not compile.

    examples  what the placeholders take: tensors, real or fake, and Python constants
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, example in zip(placeholders, examples, strict=True):
        _check_input(node, example)
    rules = _Rules()
    fake = FakeTensorMode()
    # Outside of inference mode torch takes composite operators apart before a mode sees them.
    with torch.inference_mode(False), torch.no_grad(), fake:
        inputs = [_like(example) for example in examples]
        with rules:
            _Walk(graph, rules, fake).run(*inputs)


def _check_input(node: fx.Node, example: Any) -> None:
    if isinstance(example, SYMBOLS):
        raise Rejected(
            "a symbolic number as input: the device has static shapes only; compile with dynamic=False", node
        )
    if not isinstance(example, torch.Tensor):
        return
    if any(isinstance(size, torch.SymInt) for size in example.shape):
        raise Rejected(
            f"an input of symbolic shape {list(example.shape)}: the device has static shapes only; compile with "
            "dynamic=False, once for each shape",
            node,
        )
    if example.device.type != NAME:
        raise Rejected(
            f"an input on {example.device}: every tensor that a program takes lies on {NAME!r}; copy it there first",
            node,
        )
    if example.dtype in WIDE:
        raise Rejected(f"an input of {example.dtype}, which the device does not have; give float32", node)
    if example.requires_grad and torch.is_grad_enabled():
        raise Rejected("an input that requires a gradient: the stand-in is for inference, torch.inference_mode()", node)


def _like(example: Any) -> Any:
    if not isinstance(example, torch.Tensor):
        return example
    return torch.empty_strided(
        tuple(example.shape), example.stride(), dtype=example.dtype, device=torch.device(NAME, 0)
    )


class _Walk(fx.Interpreter):
    """Runs a graph on fake tensors, and tells the rules which node is under way."""

    def __init__(self, graph: fx.GraphModule, rules: _Rules, fake: FakeTensorMode) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self._rules, self._fake = rules, fake

    def run_node(self, n: fx.Node) -> Any:
        self._rules.node = n
        if n.target in MODES:
            return None
        if n.op == "call_module" or _is_region(n.target):
            self._rules.refuse("a module, or a region as of control flow or autocast: a program is one flat graph")
        try:
            return super().run_node(n)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Rejected(f"{error.func} depends on values: {_NO_VALUES}", n) from None

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        self._rules.require_device(value)
        return self._fake.from_tensor(value)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        for tensor in _tensors(args):
            self._rules.require_device(tensor)
            if tensor.dtype == torch.int64:
                self._rules.refuse(f"an output of {tensor.dtype}: convert it to int32 in the program")
        return super().output(target, args, kwargs)


_NO_VALUES = "a program is compiled before there are values, and its shapes and bounds are Python numbers"


class _Rules(TorchDispatchMode):
    """Looks at each operator that torch comes down to, its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.node: fx.Node | None = None

    def refuse(self, reason: str) -> NoReturn:
        raise Rejected(reason, self.node)

    def require_device(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != NAME:
            self.refuse(f"a tensor on {tensor.device}: in a program all tensors lie on {NAME!r}; name the device")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question to a tensor, for its device for one
            return func(*args, **kwargs)
        self._check_operator(func, args, kwargs)
        result = func(*args, **kwargs)
        self._check_result(func, result)
        return result

    def _check_operator(self, func: Any, args: Any, kwargs: Any) -> None:
        name = _name(func)
        if name in SORTS:
            self.refuse(f"{func}: the vendor's compiler has no sort and no search; use topk, or comparisons")
        given = [
            (argument.name, tensor) for argument, value in _bound(func, args, kwargs) for tensor in _tensors(value)
        ]
        if _waits_for_values(func, name, given):
            self.refuse(f"{func} depends on values: {_NO_VALUES}")
        for argument, tensor in given:
            if name not in CONSTANTS:
                self.require_device(tensor)
            self._check_dtype(func, tensor, _moves(func) or argument in ("index", "indices"))

    def _check_result(self, func: Any, result: Any) -> None:
        name = _name(func)
        for tensor in _tensors(result):
            if name not in CONSTANTS - {"_to_copy"}:
                self.require_device(tensor)
            self._check_dtype(func, tensor, _moves(func) or name in POSITIONS)

    def _check_dtype(self, func: Any, tensor: torch.Tensor, moved: bool) -> None:
        """`moved`: the operator computes nothing with the tensor's integers."""
        dtype = tensor.dtype
        if dtype in WIDE:
            self.refuse(f"{func} with {dtype}, which the device does not have; use float32")
        if moved:
            return
        if dtype == torch.int64:
            self.refuse(
                f"{func} computes with {dtype}, which the device does in 32 bits: give dtype=torch.int32; int64 is for "
                "indices, converted where they are used"
            )
        if dtype in UNSIGNED:
            self.refuse(f"{func} computes with {dtype}, which the device does not: view or convert it to int32")


def _is_region(target: Any) -> bool:
    return target is torch.amp.autocast_mode._enter_autocast or isinstance(target, torch._ops.HigherOrderOperator)


def _bound(func: Any, args: Any, kwargs: Any) -> Iterable[tuple[Any, Any]]:
    """(argument of the schema, value) of a call; those left out have no tensors."""
    arguments = func._schema.arguments
    yield from zip(arguments, args, strict=False)
    for argument in arguments:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _name(func: Any) -> str:
    return str(func._schema.name.partition("::")[2])


def _moves(func: Any) -> bool:
    """Views, copies and conversions."""
    return func.is_view or _name(func) in COPIES


def _waits_for_values(func: Any, name: str, given: Sequence[tuple[str, torch.Tensor]]) -> bool:
    """Whether a result's shape, or a number of the program, depends on values; indices do so only where they mask."""
    if name in ("index", "index_put", "index_put_", "_unsafe_index"):
        return any(argument == "indices" and tensor.dtype in (torch.bool, torch.uint8) for argument, tensor in given)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _tensors(item: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(item) if isinstance(leaf, torch.Tensor)]
