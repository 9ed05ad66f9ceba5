"""How long kernels take: several of one op and problem, side by side, in a session of their backend.

What `Kernel.tunable` means is done here, through the contract alone; for planners, benchmarks and authors of kernels.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from lineshaft_contract.errors import Unsupported
from lineshaft_contract.kernels import HostPrepare, Kernel
from lineshaft_contract.ops.spec import Call, HostArray, OpSpec, numpy_dtype
from lineshaft_contract.problems import (
    AttendProblem,
    CollectiveProblem,
    ExpertProblem,
    KVProblem,
    Problem,
    StateProblem,
)
from lineshaft_contract.sessions import Handle, Packing, Program, Session, Tree, leaves, map_tree
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepShape
from lineshaft_contract.weights import Checkpoint, Local, Param, Stored, Weight

MARGIN = 1.03
"""Kernels within this ratio of the fastest are as fast: the first by name is taken, so that the choice is the same in
the next measurement."""
CALLS = 4
"""Calls of the op in one program, each with arrays of its own, so that no compiler takes them for one."""
MOST_BYTES = 1 << 28
"""Of the arrays that go into these calls; there are fewer calls, and at least one, where they would take more."""
ROUNDS = 7
"""How often each program runs, one kernel after the other in every round; the median counts."""
MOST_SECONDS = 0.5
"""After so long no further round begins."""

SHAPE = StepShape(tokens=1, rows=1, pages=(), logits=1, max_query=1)
"""Of programs that take no step."""
DONE = "done"
"""The output that is waited for: a corner of the last result."""


@dataclass(frozen=True)
class Choice:
    """The one taken of several tunable kernels of equal priority: the fastest, or without `seconds` the first by name.

    seconds   of a call with each of them, as measured
    failed    why each of the others could not be measured
    """

    kernel: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{name} {1e3 * taken:.4g} ms" for name, taken in self.seconds.items()) or "not measured"


@dataclass(frozen=True)
class Contest:
    """Kernels of one op and layout, for one problem.

    operands   [by position, by name]: an ArraySpec for each array, a Weight without arrays for each weight, all else as
               it is; neither caches nor steps
    params     of the weights, by their keys
    """

    spec: OpSpec
    problem: Problem
    kernels: Sequence[Kernel]
    operands: Tree
    params: Sequence[Param] = ()

    @property
    def name(self) -> str:
        return f"{self.spec.name} {self.problem.describe()}"

    def outputs(self) -> Sequence[ArraySpec]:
        """What a call gives."""
        args, named = map_tree(lambda leaf: Operand(leaf) if isinstance(leaf, ArraySpec) else leaf, self.operands)
        out = self.spec.infer(self.problem, Call(args, named, {}))
        return [spec for spec in (out if isinstance(out, tuple) else (out,)) if isinstance(spec, ArraySpec)]


@dataclass(frozen=True)
class Operand:
    """An array without values, as `OpSpec.infer` reads it."""

    spec: ArraySpec

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape


def unmeasurable(problem: Problem) -> str:
    """Why kernels are not measured on a problem of this kind; "" where they are."""
    if isinstance(problem, CollectiveProblem):
        return "no rank measures a collective alone"
    if isinstance(problem, (AttendProblem, ExpertProblem, KVProblem, StateProblem)):
        return "its time depends on the lengths and ids of real steps"
    return ""


def measure(contest: Contest, session: Callable[[], Session], checkpoint: Checkpoint) -> Choice:
    """Run the kernels of a contest; one that raises is left out, and the others run in a session anew.

    session      makes a session, which is closed before the next is made
    checkpoint   is handed on to `Session.load`; no tensor of it is read

    Raises Unsupported where all of them fail, with the reason of each.
    """
    failed: dict[str, str] = {}
    while left := [kernel for kernel in contest.kernels if kernel.name not in failed]:
        with closing(session()) as made:
            seconds = _race(replace(contest, kernels=left), made, checkpoint, failed)
        if seconds:
            return Choice(fastest(seconds), seconds, failed)
    reasons = "; ".join(f"{name} {reason}" for name, reason in failed.items())
    raise Unsupported(
        f"every kernel for {contest.name} fails: {reasons}; mend one of them, or name another under [kernels]"
    )


def fastest(seconds: Mapping[str, float]) -> str:
    """The first by name of those within MARGIN of the least."""
    return min(name for name, taken in seconds.items() if taken <= MARGIN * min(seconds.values()))


def _race(contest: Contest, session: Session, checkpoint: Checkpoint, failed: dict[str, str]) -> dict[str, float]:
    """Seconds by kernel. Nothing once one raises, which is then in `failed`."""
    calls = Calls(contest)
    first = contest.kernels[0]
    session.load(calls.params, checkpoint, {p.name: Packing(first.layout, first.pack) for p in calls.params})
    session.alloc_caches((), (), "")
    handles = calls.handles(session)
    programs: dict[str, Program] = {}
    times: dict[str, list[float]] = {kernel.name: [] for kernel in contest.kernels}
    name, began = "", time.perf_counter()
    try:
        for kernel in contest.kernels:
            name = kernel.name
            programs[name] = calls.capture(session, kernel)
        for _ in range(ROUNDS):
            for name, program in programs.items():
                times[name].append(_seconds(program, handles) / calls.count)
            if time.perf_counter() - began > MOST_SECONDS:
                break
    except Exception as error:  # whatever a kernel raises is the reason why it is left out
        message = " ".join(str(error).split())
        failed[name] = f"raises {type(error).__name__} when measured: {message}"
        return {}
    return {name: median(taken) for name, taken in times.items()}


def _seconds(program: Program, handles: Mapping[str, Handle]) -> float:
    """Of one run: the kernels' own time where the backend measures it, else until the result is there."""
    began = time.perf_counter()
    pending = program(HostStep(InputLayout([])), handles)
    pending.result(DONE)
    whole = time.perf_counter() - began
    return whole if math.isnan(pending.kernel_seconds) else pending.kernel_seconds


class Calls:
    """The programs of a contest: one that gives the arrays, and for each kernel one that calls the op with them."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest
        operands = leaves(contest.operands)
        self.params = [_filled(contest.params[leaf.key]) for leaf in operands if isinstance(leaf, Weight)]
        specs = [leaf for leaf in operands if isinstance(leaf, ArraySpec)]
        self.count = max(1, min(CALLS, MOST_BYTES // max(1, sum(spec.nbytes for spec in specs))))
        self._arrays = {f"{turn}.{i}": spec for turn in range(self.count) for i, spec in enumerate(specs)}

    def handles(self, session: Session) -> dict[str, Handle]:
        """The arrays of every call, on the device."""
        inputs = InputLayout([InputField(name, spec.dtype, spec.shape) for name, spec in self._arrays.items()])
        program = session.capture(self._give, SHAPE, inputs, OneKernel(None, self._contest.problem, self._arrays))
        host = HostStep(inputs)
        for name, spec in self._arrays.items():
            host[name][...] = values(spec.shape, spec.dtype)
        pending = program(host)
        return {name: pending.handle(name) for name in self._arrays}

    def capture(self, session: Session, kernel: Kernel) -> Program:
        """The calls with a kernel."""
        ops = OneKernel(kernel, self._contest.problem, self._outputs())
        return session.capture(self._call, SHAPE, InputLayout([]), ops, self._arrays, frozenset({DONE}))

    def _outputs(self) -> dict[str, ArraySpec]:
        made = self._contest.outputs()
        outputs = {f"{turn}.{i}": spec for turn in range(self.count) for i, spec in enumerate(made)}
        return {**outputs, DONE: ArraySpec(tuple(min(1, size) for size in made[0].shape), made[0].dtype)}

    def _give(self, ops: Any, weights: Tree, caches: Any, step: Any, arrays: Any) -> Any:
        return {name: step.arrays[name] for name in self._arrays}, caches

    def _call(self, ops: Any, weights: Tree, caches: Any, step: Any, arrays: Any) -> Any:
        given, outputs = iter([arrays[name] for name in self._arrays]), dict[str, Any]()
        for turn in range(self.count):
            taken = {ArraySpec: given, Weight: iter(weights)}
            args, named = map_tree(partial(_next, taken), self._contest.operands)
            out = ops.measured(*args, **named)
            outputs |= {f"{turn}.{i}": array for i, array in enumerate(out if isinstance(out, tuple) else (out,))}
        last = outputs[f"{self.count - 1}.0"]
        return {**outputs, DONE: last[tuple(slice(0, min(1, size)) for size in last.shape)]}, caches


def _next(taken: Mapping[type, Any], leaf: Any) -> Any:
    return next(taken[type(leaf)]) if type(leaf) in taken else leaf


@dataclass(frozen=True)
class OneKernel:
    """A program's ops (`PlannedOps`): `ops.measured` is the kernel."""

    kernel: Kernel | None
    problem: Problem
    outputs: Mapping[str, ArraySpec]

    @property
    def digest(self) -> str:
        kernel = self.kernel and [self.kernel.name, self.kernel.version, sorted(self.kernel.options.items())]
        return hashlib.sha256(repr([self.problem, kernel, sorted(self.outputs.items())]).encode()).hexdigest()

    def bind(self, session: Session) -> Any:
        if self.kernel is None:
            return SimpleNamespace()
        return SimpleNamespace(measured=self.kernel.bind(self.problem, session))

    def prepares(self, session: Session) -> list[HostPrepare]:
        made = self.kernel and self.kernel.prepare(self.problem, SHAPE, session)
        return [made] if made else []


def _filled(param: Param) -> Param:
    """The same parameter with made-up values, at every coordinate."""

    def shard(checkpoint: Checkpoint, coordinate: Any) -> Local:
        return Local((Stored("none", param.shape, {"data": values(param.shape, param.dtype)}),))

    return replace(param, shard=shard)


def values(shape: tuple[int, ...], dtype: str) -> HostArray:
    """Seeded and uniform in [0, 1), which suits activations, probabilities and temperatures; integers are 0."""
    return np.resize(np.random.default_rng(0).random(4099).astype(numpy_dtype(dtype)), shape)
