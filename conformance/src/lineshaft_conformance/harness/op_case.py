"""One case of an op as a captured program: its operands become host inputs, weights and caches of the contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lineshaft.plan import ProgramSpec
from lineshaft_conformance.harness.rig import Rig, whole_param
from lineshaft_conformance.subject import Subject
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, OpSpec
from lineshaft_contract.ops.run import operand
from lineshaft_contract.ops.spec import CacheArg, StepArg, WeightArg
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem, Problem, RopeWriteProblem
from lineshaft_contract.sessions import Cache, HostArray, StepFunction, Tree
from lineshaft_contract.steps import InputField, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Array, Param

USE = "op_under_test"
PASSED_ON = "given."
"""Prefix of outputs that are inputs handed through: a kernel that writes to its operands shows there."""

NO_STEP = StepShape(tokens=1, rows=1, pages=(), logits=1, max_query=1)
"""The shape of a program whose op takes no step."""

Give = Callable[[Tree, Sequence[Cache], StepInputs], Any]
"""Fetches one argument of the op inside the captured function."""


MARGIN = 4
"""Values on each side of a row, or of each value of a vector, whose operand is given as a slice."""


@dataclass(frozen=True)
class OpRun:
    """One run: `outputs` are the arrays that the op returned, `pages` those of the cache that it consumed, by name;
    `operands` are the inputs as it left them."""

    outputs: tuple[HostArray, ...]
    pages: dict[str, HostArray]
    operands: dict[str, HostArray]

    @property
    def result(self) -> tuple[Any, ...]:
        """All of it, as the op's reference returns it."""
        return (*self.outputs, self.pages) if self.pages else self.outputs

    @property
    def arrays(self) -> list[HostArray]:
        return [*self.outputs, *self.pages.values()]


@dataclass
class Operands:
    """What a case brings, sorted by the way it reaches the function."""

    inputs: dict[str, HostArray] = field(default_factory=dict)
    params: dict[str, Param] = field(default_factory=dict)
    weights: dict[str, HostArray] = field(default_factory=dict)
    pages: dict[str, HostArray] = field(default_factory=dict)  # of cache 0, in canonical form
    cache: KVProblem | None = None
    shape: StepShape = NO_STEP
    strided: bool = False  # whether some inputs reach the op as slices of wider arrays


@dataclass(frozen=True)
class OpCase:
    """A case, its operands, and how the function gets each argument."""

    spec: OpSpec
    case: Case
    operands: Operands
    args: tuple[Give, ...]
    kwargs: Mapping[str, Give]

    def call(self, ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        """The one call, as a StepFunction."""
        args = [give(weights, caches, step) for give in self.args]
        out = getattr(ops, USE)(*args, **{name: give(weights, caches, step) for name, give in self.kwargs.items()})
        outputs = out if isinstance(out, tuple) else (out,)
        arrays = {str(i): item for i, item in enumerate(outputs) if not isinstance(item, Cache)}
        return arrays, [item for item in outputs if isinstance(item, Cache)] or caches

    def function(self, ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        """The call, and all inputs handed through."""
        outputs, caches = self.call(ops, weights, caches, step, arrays)
        return outputs | {f"{PASSED_ON}{name}": step.arrays[name] for name in self.operands.inputs}, caches

    def program(self, function: StepFunction) -> ProgramSpec:
        inputs = self.operands.inputs
        fields = [InputField(name, array.dtype.name, array.shape) for name, array in inputs.items()]
        return ProgramSpec("op", function, self.operands.shape, InputLayout(fields))

    def compiled(self, subject: Subject, kernels: Sequence[Kernel]) -> Rig:
        """A session with a program of the call alone; its cache holds nothing, so that it need not run."""
        return self._rig(subject, kernels, self.call)

    def rig(self, subject: Subject, kernels: Sequence[Kernel]) -> Rig:
        """A session with this case's program; its cache holds the case's pages."""
        rig = self._rig(subject, kernels, self.function)
        self.fill(rig)
        return rig

    def _rig(self, subject: Subject, kernels: Sequence[Kernel], function: StepFunction) -> Rig:
        held = self.operands
        pages = len(next(iter(held.pages.values()))) if held.pages else 0
        return Rig(
            subject, [self.program(function)], params=held.params, values=held.weights, kernels=kernels,
            caches=[held.cache] if held.cache else [], pages=[pages] * (held.cache.group + 1 if held.cache else 0),
            uses={USE: (self.spec.name, self.case.problem)},
        )  # fmt: skip

    def fill(self, rig: Rig) -> None:
        """Put this case's pages into the cache, null page included."""
        if self.operands.pages:
            rig.session.write_pages(0, self._page_ids, self.operands.pages).wait()

    def refill(self, rig: Rig) -> None:
        """Put this case's weights and pages in the place of those of another case of the same id."""
        if self.operands.weights:
            rig.session.update(self.operands.weights)
        self.fill(rig)

    def run(self, rig: Rig) -> OpRun:
        """Run once."""
        out = rig.run(self.operands.inputs)
        start = len(PASSED_ON)
        after = {name[start:]: array for name, array in out.items() if name.startswith(PASSED_ON)}
        outputs = tuple(array for name, array in out.items() if not name.startswith(PASSED_ON))
        return OpRun(outputs, rig.session.read_pages(0, self._page_ids) if self.spec.consumes else {}, after)

    @property
    def _page_ids(self) -> HostArray:
        return np.arange(len(next(iter(self.operands.pages.values()))), dtype=np.int32)


def prepare(spec: OpSpec, case: Case, *, strided: bool = False) -> OpCase:
    """Sort a case's arguments; float64 operands are rounded to the executed dtype, as the contract says.

    strided: give operands as slices of wider rows, and vectors as a column, with NaN beside them or other integers of
    their own.
    """
    held = Operands()
    give = Giving(held, spec, case, strided)
    args = tuple(give(f"arg{i}", value) for i, value in enumerate(case.args))
    return OpCase(spec, case, held, args, {name: give(name, value) for name, value in case.kwargs.items()})


class Giving:
    """Sorts the arguments of one case into its operands; a call returns how the function gets the argument."""

    def __init__(self, held: Operands, spec: OpSpec, case: Case, strided: bool) -> None:
        self._held, self._spec, self._problem, self._strided = held, spec, case.problem, strided

    def __call__(self, name: str, value: Any) -> Give:
        held, host = self._held, operand(value, self._problem)
        if isinstance(value, WeightArg):
            held.params[name] = whole_param(name, host, {value.kind: _weight_problem(self._spec, self._problem, host)})
            held.weights[name] = host
            return lambda weights, caches, step: weights[name]
        if isinstance(value, CacheArg) and held.cache is None:
            held.cache, held.pages = cache_problem(self._problem), dict(host)
            return lambda weights, caches, step: caches[0]
        if isinstance(value, StepArg):
            held.inputs.update(value.arrays)
            held.shape = value.shape
            return lambda weights, caches, step: step
        if isinstance(value, (Mapping, CacheArg)):
            return self._named(host, "" if isinstance(value, Mapping) else f"{name}.")
        if isinstance(value, list):
            items = [self(f"{name}.{i}", item) for i, item in enumerate(value)]
            return lambda weights, caches, step: [give(weights, caches, step) for give in items]
        if isinstance(host, np.ndarray):
            return self._array(name, host)
        return lambda weights, caches, step: host

    def _named(self, host: Mapping[str, HostArray], prefix: str) -> Give:
        items = {key: self._array(f"{prefix}{key}", array) for key, array in host.items()}

        def give(weights: Tree, caches: Sequence[Cache], step: StepInputs) -> dict[str, Array]:
            return {key: item(weights, caches, step) for key, item in items.items()}

        return give

    def _array(self, name: str, host: HostArray) -> Give:
        if not self._strided or host.ndim < 1 or len(host) < 2:
            self._held.inputs[name] = host
            return lambda weights, caches, step: step.arrays[name]
        rows, shape = host.reshape(host.shape[0], -1), host.shape
        width = rows.shape[1]
        self._held.inputs[name] = np.concatenate([beside(rows), rows, beside(rows)], axis=1)
        self._held.strided = True
        return lambda weights, caches, step: step.arrays[name][:, MARGIN : MARGIN + width].reshape(*shape)


def beside(rows: HostArray) -> HostArray:
    """rows [n, w] -> [n, MARGIN] that no result may depend on: NaN, or integers that are in range, as they are read for
    an index by a kernel that is wrong."""
    if rows.dtype.kind in "iub":
        return np.repeat(rows[::-1, :1], MARGIN, axis=1)
    return np.full((len(rows), MARGIN), np.nan, rows.dtype)


def _weight_problem(spec: OpSpec, problem: Problem, array: HostArray) -> Problem:
    """The problem of the weight's Param: the case's own, or for a composite's parts a product per head [H, n, k]."""
    if spec.weight:
        return problem
    heads, n, k = array.shape
    return LinearProblem(dtype=problem.dtype, n=n, k=k, heads=heads)


def cache_problem(problem: Problem) -> KVProblem:
    """The problem of the cache that a case of `problem` reads or writes."""
    if isinstance(problem, KVProblem):
        return dataclasses.replace(problem.kv if isinstance(problem, RopeWriteProblem) else problem, rows=0)
    assert isinstance(problem, AttendProblem)
    return KVProblem(
        dtype=problem.dtype, kv_heads=problem.kv_heads, qk_dim=problem.qk_dim,
        v_dim=0 if problem.value_in_key else problem.v_dim, page_size=problem.page_size, kv_dtype=problem.kv_dtype,
        group=problem.group, kv_scheme=problem.kv_scheme,
    )  # fmt: skip
