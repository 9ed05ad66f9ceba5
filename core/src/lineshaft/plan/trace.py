"""Tracing a forward with abstract arrays: which ops it calls, under which problems, and that it obeys the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lineshaft.errors import Unsupported
from lineshaft_contract.ops.spec import Call, Inferred, OpSpec
from lineshaft_contract.problems import KVProblem, Problem
from lineshaft_contract.restricted import Restricted, violate
from lineshaft_contract.sessions import Cache, StepFunction, Tree, leaves, map_tree
from lineshaft_contract.steps import ArraySpec, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Param, Weight

Pair = tuple[str, Problem]
"""An op and what it is to do: what a kernel is chosen for."""

Resolvable = Callable[[str, Problem], bool]
"""Whether some kernel takes a pair."""


@dataclass(frozen=True)
class ProgramSpec:
    """One function to capture for one bucket; `optional` names what a run can do without ("": nothing)."""

    name: str
    fn: StepFunction
    shape: StepShape
    inputs: InputLayout
    arrays: Mapping[str, ArraySpec] = field(default_factory=dict)
    host_outputs: frozenset[str] = frozenset()
    optional: str = ""


@dataclass(frozen=True)
class Workload:
    """Everything that is to be planned at once: a model's parameters, caches, declared uses and programs; and what a
    reader of the plan should know besides."""

    params: Tree
    caches: Sequence[KVProblem]
    uses: Mapping[str, Pair]
    programs: Sequence[ProgramSpec]
    degrees: Mapping[str, int]
    notes: tuple[str, ...] = ()


class AbstractArray(Restricted):
    """An array with a shape and no values; `base` is the one that it is a view of, `label` says where it comes from."""

    __slots__ = ("base", "label", "spec")

    def __init__(self, spec: ArraySpec, label: str, base: AbstractArray | None = None) -> None:
        self.spec, self.label, self.base = spec, label, base

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def _reshaped(self, shape: tuple[int, ...]) -> AbstractArray:
        return self._view(shape, f"{self.label} as {shape}")

    def _sliced(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> AbstractArray:
        return self._view(shape, f"{self.label} at {index}")

    def _view(self, shape: tuple[int, ...], label: str) -> AbstractArray:
        return AbstractArray(ArraySpec(shape, self.spec.dtype), label, self)


@dataclass(frozen=True)
class Site:
    """One distinct call: the name used in the forward, the op, the dispatch key of its arguments and its problem."""

    name: str
    op: str
    key: tuple[Any, ...]
    problem: Problem
    weights: tuple[int, ...] = ()  # keys of the Weight arguments, all read in the kernel's packing
    cache: bool = False
    composite: bool = False  # run by the op's default decomposition
    operands: Tree = field(default=(), compare=False)  # [by position, by name], a spec for each array

    @property
    def pair(self) -> Pair:
        return self.op, self.problem


class Workspace:
    """Bytes of the results that are alive at once: how many now, and the most that ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def hold(self, spec: ArraySpec, label: str) -> AbstractArray:
        """A result that counts until the forward and all its views have dropped it."""
        self.now += spec.nbytes
        self.most = max(self.most, self.now)
        array = Held(spec, label)
        array.workspace = self
        return array


class Held(AbstractArray):
    """A result that its workspace counts until it is dropped."""

    workspace: Workspace

    def __del__(self) -> None:
        self.workspace.now -= self.spec.nbytes


@dataclass
class Trace:
    """All sites of one program, in first-call order, with the number of calls of each, and what its results take.

    `flow` has a line for each call in order, with where each argument comes from, and one for each output.
    """

    shape: StepShape
    sites: dict[tuple[str, tuple[Any, ...]], Site] = field(default_factory=dict)
    calls: dict[tuple[str, tuple[Any, ...]], int] = field(default_factory=dict)
    outputs: dict[str, ArraySpec] = field(default_factory=dict)
    workspace: Workspace = field(default_factory=Workspace)
    flow: list[str] = field(default_factory=list)


def dispatch_key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells two calls of one name apart: weights by key, caches by problem, arrays by shape, statics by value."""
    return (*map(_item_key, args), *((name, _item_key(kwargs[name])) for name in sorted(kwargs)))


def _item_key(item: Any) -> Any:
    if isinstance(item, Weight):
        return ("weight", item.key)
    if isinstance(item, Cache):
        return item.problem
    if isinstance(item, (StepInputs, Mapping)):
        return None
    if isinstance(item, (list, tuple)):
        return tuple(map(_item_key, item))
    return tuple(item.shape) if hasattr(item, "shape") else item


def label_of(item: Any) -> Any:
    """Where an argument comes from; a static argument as it is."""
    if isinstance(item, AbstractArray):
        return item.label
    if isinstance(item, (Weight, Cache)):
        return f"{type(item).__name__} {item.key}"
    if isinstance(item, StepInputs):
        return "the step"
    if isinstance(item, Mapping):
        return {name: label_of(value) for name, value in item.items()}
    return list(map(label_of, item)) if isinstance(item, (list, tuple)) else item


class Parts:
    """The `ops` of a composite's decomposition: ops with a problem of their own in it are called by names of their own,
    as another composite may have a part of the same name; all others by the names that a forward uses."""

    def __init__(self, ops: Any, composite: str, problems: Mapping[str, Problem]) -> None:
        self._ops, self._composite, self.problems = ops, composite, problems

    def __getattr__(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(self._ops, self.name_of(name))
        return found

    def name_of(self, op: str) -> str:
        return f"{self._composite}/{op}" if op in self.problems else op


class Tracer:
    """The `ops` of an abstract run. `resolvable` says whether a composite has a kernel of its own."""

    def __init__(self, specs: Mapping[str, OpSpec], work: Workload, shape: StepShape, resolvable: Resolvable) -> None:
        self._specs, self._degrees, self._resolvable = specs, work.degrees, resolvable
        self._uses = dict(work.uses)
        self.trace = Trace(shape)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op, base = self._uses.get(name, (name, None))
        spec = self._specs.get(op)
        if spec is None:
            raise Unsupported(f"the forward calls ops.{name}, which is no op of the contract and no declared use")
        return partial(self._record, name, spec, base)

    def _record(self, name: str, spec: OpSpec, base: Problem | None, /, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs, self._degrees)
        held = [item for item in args if isinstance(item, Weight)] if spec.weight else []
        problem = spec.specialise(held[0].problems[spec.weight] if held else base, call)
        check_optional(spec, problem, kwargs)
        self.trace.flow.append(f"{name} {problem} {label_of(args)} {label_of(kwargs)}")
        composite = spec.default is not None and not self._resolvable(spec.name, problem)
        seen = (name, dispatch_key(args, kwargs))
        if seen not in self.trace.sites:
            self.trace.sites[seen] = Site(
                name, spec.name, seen[1], problem, weights=tuple(weight.key for weight in held),
                cache=any(isinstance(item, Cache) for item in args), composite=composite,
                operands=map_tree(lambda x: x.spec if isinstance(x, AbstractArray) else x, [[*args], {**kwargs}]),
            )  # fmt: skip
        self.trace.calls[seen] = self.trace.calls.get(seen, 0) + 1
        if composite:
            assert spec.default is not None
            parts = Parts(self, name, spec.parts(problem))
            self._uses |= {parts.name_of(op): (op, part) for op, part in parts.problems.items()}
            return spec.default(parts, problem, *args, **kwargs)
        return self._result(spec, problem, call)

    def _result(self, spec: OpSpec, problem: Problem, call: Call) -> Any:
        out = spec.infer(problem, call)
        number = len(self.trace.flow)
        if isinstance(out, tuple):
            return tuple(self._one(item, call, f"call {number}.{i}") for i, item in enumerate(out))
        return self._one(out, call, f"call {number}")

    def _one(self, out: Inferred, call: Call, label: str) -> AbstractArray | Cache:
        if isinstance(out, ArraySpec):
            return self.trace.workspace.hold(out, label)
        return next(item for item in call.args if isinstance(item, Cache))


def check_optional(spec: OpSpec, problem: Problem, kwargs: Mapping[str, Any]) -> None:
    """An optional array is passed exactly when the problem's field of that name is set, else ContractViolation."""
    used = problem.features() if spec.optional else frozenset()
    for keyword, feature in spec.optional.items():
        passed, wanted = kwargs.get(keyword) is not None, feature in used
        if passed != wanted:
            given, asked = ("" if passed else "not "), ("sets" if wanted else "does not set")
            violate(f"ops.{spec.name}: {keyword}= is {given}passed but the problem {asked} {feature}")


def abstract_weights(params: Tree) -> Tree:
    """The tree of Weights without values; keys number the distinct Params in leaf order."""
    keys: dict[str, int] = {}

    def one(param: Param) -> Weight | AbstractArray:
        key = keys.setdefault(param.name, len(keys))
        if "const" in param.problems:
            return AbstractArray(ArraySpec(param.shape, param.dtype), f"const {key}")
        return Weight(key, param.name, param.problems, "")

    return map_tree(one, params)


def trace_program(program: ProgramSpec, work: Workload, specs: Mapping[str, OpSpec], resolvable: Resolvable) -> Trace:
    """Run the function once on abstract arrays; raises ContractViolation if it leaves the contract or drops a cache."""
    tracer = Tracer(specs, work, program.shape, resolvable)
    trace, caches = tracer.trace, [Cache(i, problem, "") for i, problem in enumerate(work.caches)]
    fields = program.inputs.fields
    views = {f.name: AbstractArray(ArraySpec(f.shape, f.dtype), f"input {f.name}") for f in fields}
    given = {name: AbstractArray(spec, f"array {name}") for name, spec in program.arrays.items()}
    step = StepInputs(views, program.shape)
    outputs, after = program.fn(tracer, abstract_weights(work.params), list(caches), step, given)
    if len(after) != len(caches):
        violate(f"{len(after)} caches come back, {len(caches)} went in")
    trace.outputs = {name: value.spec for name, value in outputs.items()}
    trace.flow += [f"{name} = {label_of(value)}" for name, value in outputs.items()]
    return trace


def distinct_params(params: Tree) -> list[Param]:
    """Each Param once, in leaf order; its position is its Weight's key."""
    return list({param.name: param for param in leaves(params)}.values())
