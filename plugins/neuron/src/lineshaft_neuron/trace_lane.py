"""The lane of torch-neuronx before 2.10: each program through torch_neuronx.trace, with the caches as state that stays
on the device. Declared: it is checked against the vendor's recorded signatures, and was never run on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from lineshaft_contract.errors import BackendUnavailable, ContractViolation, Unsupported
from lineshaft_neuron.lanes import Compiled, Counts, shapes

log = logging.getLogger(__name__)
COLLECTIVES = ("_c10d_functional", "c10d_functional", "c10d")


class TraceLane:
    """Compiles programs by `torch_neuronx.trace`, one for each graph.

    What a program writes is a parameter of what is traced, made of the session's own tensor, and aliased to an output,
    so that the device keeps it. All else, weights too, are inputs: they lie on the device, as they all must for outputs
    to stay there, and programs, ranks and new weights share one compiled program.

    The vendor's documentation does not say whether a traced program keeps the very tensor that it was given as state.
    If it does, programs share it and nothing is copied. If it does not, each has its own, and every call copies the
    session's tensors in and out: right, and slow, so `copying` counts such programs and a warning is logged.
    Nothing is kept on disk either: the vendor's cache does not cover traced programs.
    """

    name = "trace"

    def __init__(self, package: ModuleType, device: torch.device, flags: Sequence[str] = (), core: int = 0) -> None:
        """package  torch_neuronx, or what has its entry points
        device   where the session's tensors lie
        flags    for the compiler
        core     number of the core, among those visible to this process
        """
        self.device = device
        self.counts = Counts()
        self.copying = 0
        self._package, self._flags, self._core = package, list(flags), core
        self._sealed = self._closed = False
        self._programs: list[TracedProgram] = []

    def compile(self, graph: fx.GraphModule, examples: Sequence[torch.Tensor], written: Sequence[int]) -> Compiled:
        """As in `Lane`. Raises ContractViolation once sealed, Unsupported for a graph with collectives,
        BackendUnavailable where the vendor's compiler fails."""
        if self._sealed or self._closed:
            raise ContractViolation(
                f"a program would be compiled after warm-up, for {shapes(examples)}; every shape has to be a bucket"
            )
        refuse_collectives(graph)
        state = StateProgram(functional(graph, examples, written), examples, written)
        traced = self._trace(state)
        program = TracedProgram(traced, state, self._states(traced, state))
        self.counts.compiled += 1
        if program.copies:
            self.copying += 1
            log.warning(
                "torch_neuronx.trace has not kept the session's caches as state: the program for %s copies them in and "
                "out at every call, which is slow; torch-neuronx 2.10 or later needs no copies",
                shapes([examples[number] for number in state.inputs]),
            )
        self._programs.append(program)
        return program

    def seal(self) -> None:
        self._sealed = True

    def unseal(self) -> None:
        self._sealed = False

    def close(self) -> None:
        self._closed = True
        for program in self._programs:
            program.free()
        self._programs.clear()

    def _trace(self, state: StateProgram) -> Callable[..., Any]:
        try:
            traced = self._package.trace(
                state,
                tuple(state.example(number) for number in state.inputs),
                input_output_aliases=state.aliases(),
                compiler_args=self._flags or None,
            )
            self._package.move_trace_to_device(traced, self._core)
        except Exception as error:  # the vendor's compiler raises what it likes
            said = f"{type(error).__name__}: {' '.join(str(error).split()):.500}"
            raise BackendUnavailable(
                f"torch_neuronx.trace failed for {shapes([state.example(n) for n in state.inputs])} ({said}); "
                "set other compiler_flags, or another bucket table"
            ) from error
        return cast("Callable[..., Any]", traced)

    def _states(self, traced: Callable[..., Any], state: StateProgram) -> list[torch.Tensor]:
        """The tensors that the traced program holds as state, in the order of the aliases. There are no others, since
        weights are inputs."""
        found = list(cast(torch.nn.Module, traced).parameters())
        if [held.shape for held in found] != [kept.shape for kept in state.kept]:
            raise BackendUnavailable(
                f"torch_neuronx.trace keeps as state {shapes(found) or 'nothing'}, and input_output_aliases names "
                f"{shapes(list(state.kept))}; this torch-neuronx is not known: install 2.9, or 2.10 and later"
            )
        return [held.detach() for held in found]


class StateProgram(torch.nn.Module):
    """What is traced: a graph that changes nothing in place, with what it writes as parameters. Called with the
    tensors of `inputs`; returns the outputs of the graph, then the new values of the parameters."""

    def __init__(self, graph: fx.GraphModule, examples: Sequence[torch.Tensor], written: Sequence[int]) -> None:
        super().__init__()
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.graph = graph
        self.written = tuple(written)
        self.inputs = tuple(n for n, node in enumerate(places) if node.users and n not in self.written)
        self.outputs = len(outputs_of(graph)) - len(self.written)
        self.kept = torch.nn.ParameterList(
            [torch.nn.Parameter(examples[number].detach(), requires_grad=False) for number in self.written]
        )
        self._examples = {number: (tuple(examples[number].shape), examples[number].dtype) for number in self.inputs}
        self._count = len(places)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments: list[Any] = [None] * self._count  # None for what the graph does not read
        for number, tensor in (*zip(self.inputs, tensors, strict=True), *zip(self.written, self.kept, strict=True)):
            arguments[number] = tensor
        device = tensors[0].device if tensors else self.kept[0].device
        return tuple(OnDevice(self.graph, device).run(*arguments, enable_io_processing=False))

    def aliases(self) -> dict[torch.Tensor, int]:
        """Each parameter's number among the outputs."""
        return {kept: self.outputs + at for at, kept in enumerate(self.kept)}

    def example(self, number: int) -> torch.Tensor:
        """Zeros of a placeholder's shape and dtype, on the host, where tracing takes them from."""
        shape, dtype = self._examples[number]
        return torch.zeros(shape, dtype=dtype)


class OnDevice(fx.Interpreter):
    """Runs a graph where its inputs are: tracing moves them to a device of its own, and what the graph makes anew, and
    the constants that it holds, have to follow."""

    def __init__(self, graph: fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph)
        self._device = device

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moved = {**kwargs, "device": self._device} if kwargs.get("device") is not None else kwargs
        return super().call_function(target, args, moved)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().get_attr(target, args, kwargs)
        return found.to(self._device) if isinstance(found, torch.Tensor) else found


class TracedProgram:
    """A traced program as the session calls it: with a tensor for each placeholder."""

    def __init__(self, traced: Callable[..., Any], state: StateProgram, held: Sequence[torch.Tensor]) -> None:
        self._traced: Callable[..., Any] | None = traced
        self._inputs, self._outputs = state.inputs, state.outputs
        self._held = list(zip(state.written, held, strict=True))
        self.copies = not all(map(same_memory, held, state.kept))
        """Whether the program holds caches of its own, which every call fills from the session's and writes back."""

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if self._traced is None:
            raise ContractViolation("a program is called after its lane was closed")
        other = [(tensors[number], held) for number, held in self._held if not same_memory(tensors[number], held)]
        for given, held in other:
            held.copy_(given)
        found = self._traced(*(tensors[number] for number in self._inputs))
        for given, held in other:
            given.copy_(held)
        return [found] if isinstance(found, torch.Tensor) else list(found)[: self._outputs]

    def free(self) -> None:
        """Let go of the compiled program and of its state."""
        self._traced = None
        self._held = []


def functional(graph: fx.GraphModule, examples: Sequence[torch.Tensor], written: Sequence[int]) -> fx.GraphModule:
    """The same graph without changes in place: what it wrote comes as outputs after its own, in the order of `written`.

    Raises ContractViolation where it writes to a placeholder that is not among `written`.
    """
    constants = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}

    def pure(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = tensors[: len(examples)]
        fresh = [tensor.clone() if number in written else tensor for number, tensor in enumerate(given)]
        held = dict(zip(constants, tensors[len(examples) :], strict=True))
        outputs = torch.func.functional_call(graph, held, tuple(fresh))
        return (*outputs, *(fresh[number] for number in written))

    made = make_fx(functionalize(pure, remove="mutations"), tracing_mode="fake")(*examples, *constants.values())
    places = [node for node in made.graph.nodes if node.op == "placeholder"]
    for number, place in enumerate(places):
        if any(user.target is torch.ops.aten.copy_.default for user in place.users):
            raise ContractViolation(f"the graph writes to its placeholder {number}, which is not a cache")
    for number in written:
        _unclone(places[number])
    for number, (place, value) in enumerate(zip(places[len(examples) :], constants.values(), strict=True)):
        _hold(made, place, f"constant_{number}", value)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def _unclone(place: fx.Node) -> None:
    """Let what reads the copy of a placeholder read the placeholder: nothing writes to it any more."""
    for user in list(place.users):
        if user.target is torch.ops.aten.clone.default:
            user.replace_all_uses_with(place)
            place.graph.erase_node(user)


def _hold(made: fx.GraphModule, place: fx.Node, name: str, value: torch.Tensor) -> None:
    """Make a placeholder a constant that the graph holds."""
    made.register_buffer(name, value.detach())
    with made.graph.inserting_before(place):
        place.replace_all_uses_with(made.graph.get_attr(name))
    made.graph.erase_node(place)


def outputs_of(graph: fx.GraphModule) -> tuple[Any, ...]:
    """What the output node of a flat graph lists."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return tuple(output.args[0])


def refuse_collectives(graph: fx.GraphModule) -> None:
    """Raises Unsupported for a graph in which ranks meet."""
    for node in graph.graph.nodes:
        module = str(getattr(node.target, "__module__", ""))
        if str(node.target).partition(".")[0] in COLLECTIVES or module.startswith("torch.distributed"):
            raise Unsupported(
                f"the graph calls {node.target}, and torch_neuronx.trace compiles for one core; set cp, ep and tp to "
                "1, or install torch-neuronx 2.10 or later"
            )


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same memory."""
    return one.device == other.device and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
