"""One case of an op as a captured program: its operands become host inputs, weights and caches of the contract."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lineshaft.contract.kernels import Kernel
from lineshaft.contract.ops import Case, OpSpec
from lineshaft.contract.ops.run import operand
from lineshaft.contract.ops.spec import CacheArg, StepArg, WeightArg
from lineshaft.contract.problems import AttendProblem, KVProblem, LinearProblem, Problem
from lineshaft.contract.sessions import Cache, Tree
from lineshaft.contract.steps import InputField, InputLayout, StepInputs, StepShape
from lineshaft.contract.weights import Array, Param
from lineshaft.plan import ProgramSpec
from lineshaft_conformance.rig import HostArray, Rig, whole_param
from lineshaft_conformance.subject import Subject

USE = "op_under_test"
PASSED_ON = "given"
"""Prefix of outputs that are inputs handed through: a kernel that writes to its operands shows there."""

NO_STEP = StepShape(tokens=1, rows=1, pages=(), logits=1, max_query=1)
"""The shape of a program whose op takes no step."""

Give = Callable[[Tree, Sequence[Cache], StepInputs], Any]
"""Fetches one argument of the op inside the captured function."""


@dataclass
class Operands:
    """What a case brings, sorted by the way it reaches the function."""

    inputs: dict[str, HostArray] = field(default_factory=dict)
    params: dict[str, Param] = field(default_factory=dict)
    weights: dict[str, HostArray] = field(default_factory=dict)
    pages: dict[str, HostArray] = field(default_factory=dict)  # of cache 0, in canonical form
    cache: KVProblem | None = None
    shape: StepShape = NO_STEP


@dataclass(frozen=True)
class OpCase:
    """A case, its operands, and how the function gets each argument."""

    spec: OpSpec
    case: Case
    operands: Operands
    args: tuple[Give, ...]
    kwargs: Mapping[str, Give]

    def function(self, ops: Any, weights: Tree, caches: list[Cache], step: StepInputs, arrays: Any) -> Any:
        """The one call, as a StepFunction."""
        args = [give(weights, caches, step) for give in self.args]
        out = getattr(ops, USE)(*args, **{name: give(weights, caches, step) for name, give in self.kwargs.items()})
        if self.spec.consumes:
            return {}, [out]
        outputs = out if isinstance(out, tuple) else (out,)
        return {str(i): array for i, array in enumerate(outputs)}, caches

    def program(self) -> ProgramSpec:
        fields = [InputField(name, array.dtype.name, array.shape) for name, array in self.operands.inputs.items()]
        return ProgramSpec("op", self.function, self.operands.shape, InputLayout(fields))

    def rig(self, subject: Subject, kernels: Sequence[Kernel]) -> Rig:
        """A session with this case's program; its cache holds the case's pages."""
        held = self.operands
        pages = len(next(iter(held.pages.values()))) if held.pages else 0
        rig = Rig(
            subject, [self.program()], params=held.params, values=held.weights, kernels=kernels,
            caches=[held.cache] if held.cache else [], pages=[pages] * (held.cache.group + 1 if held.cache else 0),
            uses={USE: (self.spec.name, self.case.problem)},
        )  # fmt: skip
        self.fill(rig)
        return rig

    def fill(self, rig: Rig) -> None:
        """Put this case's pages into the cache, null page included."""
        if self.operands.pages:
            count = len(next(iter(self.operands.pages.values())))
            rig.session.write_pages(0, np.arange(count, dtype=np.int32), self.operands.pages).wait()

    def result(self, rig: Rig) -> Any:
        """Run once; the outputs as the op's reference returns them."""
        out = rig.run(self.operands.inputs)
        if self.spec.consumes:
            count = len(next(iter(self.operands.pages.values())))
            return rig.session.read_pages(0, np.arange(count, dtype=np.int32))
        return tuple(out[str(i)] for i in range(len(out))) if len(out) > 1 else out["0"]


def prepare(spec: OpSpec, case: Case) -> OpCase:
    """Sort a case's arguments; float64 operands are rounded to the executed dtype, as the contract says."""
    held = Operands()
    args = tuple(_give(held, spec, case, f"arg{i}", value) for i, value in enumerate(case.args))
    kwargs = {name: _give(held, spec, case, name, value) for name, value in case.kwargs.items()}
    return OpCase(spec, case, held, args, kwargs)


def _give(held: Operands, spec: OpSpec, case: Case, name: str, value: Any) -> Give:
    host = operand(value, case.problem)
    if isinstance(value, WeightArg):
        held.params[name] = whole_param(name, host, {value.kind: _weight_problem(spec, case.problem, host)})
        held.weights[name] = host
        return lambda weights, caches, step: weights[name]
    if isinstance(value, CacheArg) and held.cache is None:
        held.cache, held.pages = cache_problem(case.problem), dict(host)
        return lambda weights, caches, step: caches[0]
    if isinstance(value, StepArg):
        held.inputs.update(value.arrays)
        held.shape = value.shape
        return lambda weights, caches, step: step
    if isinstance(value, (Mapping, CacheArg)):
        return _named(held, {key: key if isinstance(value, Mapping) else f"{name}.{key}" for key in host}, host)
    if isinstance(value, list):
        items = [_give(held, spec, case, f"{name}.{i}", item) for i, item in enumerate(value)]
        return lambda weights, caches, step: [give(weights, caches, step) for give in items]
    if isinstance(host, np.ndarray):
        held.inputs[name] = host
        return lambda weights, caches, step: step.arrays[name]
    return lambda weights, caches, step: host


def _named(held: Operands, names: Mapping[str, str], host: Mapping[str, HostArray]) -> Give:
    held.inputs.update({names[key]: array for key, array in host.items()})

    def give(weights: Tree, caches: Sequence[Cache], step: StepInputs) -> dict[str, Array]:
        return {key: step.arrays[name] for key, name in names.items()}

    return give


def _weight_problem(spec: OpSpec, problem: Problem, array: HostArray) -> Problem:
    """The problem of the weight's Param: the case's own, or for a composite's parts a product per head [H, n, k]."""
    if spec.weight:
        return problem
    heads, n, k = array.shape
    return LinearProblem(dtype=problem.dtype, n=n, k=k, heads=heads)


def cache_problem(problem: Problem) -> KVProblem:
    """The problem of the cache that a case of `problem` reads or writes."""
    if isinstance(problem, KVProblem):
        return dataclasses.replace(problem, rows=0)
    assert isinstance(problem, AttendProblem)
    return KVProblem(
        dtype=problem.dtype, kv_heads=problem.kv_heads, qk_dim=problem.qk_dim,
        v_dim=0 if problem.value_in_key else problem.v_dim, page_size=problem.page_size, kv_dtype=problem.kv_dtype,
        group=problem.group, kv_scheme=problem.kv_scheme,
    )  # fmt: skip
