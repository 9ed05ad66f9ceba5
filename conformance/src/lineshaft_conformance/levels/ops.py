"""L1 and L2: every case of every op's OpSpec, on each kernel that claims it, through plan, capture and replay.

Ops over the paged cache belong to level 2, all others to level 1; collectives are checked at level 3. Knows no op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from lineshaft.errors import Unsupported
from lineshaft.plan.resolve import Candidates, Resolver
from lineshaft_conformance.checks import Check, Failure, Found, NotClaimed, fail, require, require_dtype
from lineshaft_conformance.harness.op_case import PASSED_ON, OpCase, OpRun, prepare
from lineshaft_conformance.harness.rig import Rig
from lineshaft_conformance.results import Deviation
from lineshaft_conformance.subject import Subject
from lineshaft_contract.backends import Capabilities
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, Numerics, OpSpec
from lineshaft_contract.ops.run import named_outputs, run_reference
from lineshaft_contract.ops.spec import EXACT, CacheArg, Size, Tolerance
from lineshaft_contract.problems import Problem
from lineshaft_contract.sessions import HostArray

Book = Callable[[str, int], Mapping[str, Case]]
"""(op, seed) -> the op's cases by id, with the values of that seed."""

TURNS = ("{}", "in a replay with other values, after the first run was right: {}")
"""How a failure is told of the first run of a program, and of a later one."""

STRIDED = "strided"
FUZZED = 4
"""Random problems of an op for each seed, where its OpSpec makes any."""


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    cases: Book = subject.keep(("cases", size), lambda: case_book(subject.ops, size))
    for spec in subject.ops.values():
        if spec.collective:
            continue
        found = cases(spec.name, 0)
        level = 2 if any(isinstance(arg, CacheArg) for case in found.values() for arg in case.args) else 1
        for case in found.values():
            yield _case_check(spec, case, f"L{level}/{spec.name}/{case.id}", cases, strided=False)
            if case.problem.dtype == "float32" and prepare(spec, case, strided=True).operands.strided:
                yield _case_check(spec, case, f"L{level}/{spec.name}/{STRIDED}/{case.id}", cases, strided=True)
        if spec.required:
            yield _minimum_check(spec, level, cases)
        if spec.fuzz is not None:
            yield _fuzz_check(spec, level, spec.fuzz)


def case_book(ops: Mapping[str, OpSpec], size: Size) -> Book:
    """The cases of every op by seed; the latest few are kept."""

    @lru_cache(maxsize=4)
    def cases(op: str, seed: int) -> Mapping[str, Case]:
        return {case.id: case for case in ops[op].cases(np.random.default_rng(seed), size)}

    return cases


def _case_check(spec: OpSpec, case: Case, id: str, cases: Book, *, strided: bool) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        values = [cases(spec.name, 2 * seed)[case.id], cases(spec.name, 2 * seed + 1)[case.id]]
        return run_case(subject, spec, [prepare(spec, item, strided=strided) for item in values])

    rule = "a kernel accepts rows with a stride, or declines" if strided else case.why or f"ops.{spec.name}"
    return Check(
        id, run, rule=rule, op=spec.name, dtype=case.problem.dtype, shape_class=case.id.partition("/")[0],
        limit=120.0,
    )  # fmt: skip


def _fuzz_check(spec: OpSpec, level: int, fuzz: Callable[[np.random.Generator, int], Case]) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        found, declined = [], NotClaimed()
        for n in range(FUZZED * seed, FUZZED * (seed + 1)):
            values = [prepare(spec, fuzz(np.random.default_rng([seed, turn]), n)) for turn in range(2)]
            try:
                found.append(run_case(subject, spec, values))
            except NotClaimed as error:
                declined = error
        if not found:
            raise declined
        return together(found)

    rule = f"ops.{spec.name}: random problems, others for every seed"
    return Check(f"L{level}/{spec.name}/fuzz", run, rule=rule, op=spec.name, shape_class="fuzz", limit=120.0)


def run_case(subject: Subject, spec: OpSpec, values: Sequence[OpCase]) -> Found:
    """Run each kernel that claims the case on its values, and on the first ones again.

    Raises NotClaimed where none does, with each kernel's reason, and Failure for one that is wrong.
    """
    problem = values[0].case.problem
    require_dtype(subject, problem.dtype)
    others = [kernel for kernel in subject.kernels if kernel.op != spec.name]
    expected = [Expected(item) for item in values]
    if claimed := claims(subject, spec, problem).taken:
        trials = [run_kernel(subject, [kernel, *others], kernel.name, expected) for kernel in claimed]
    elif spec.default is not None:
        try:
            trials = [run_kernel(subject, others, "", expected)]
        except Unsupported as error:
            raise NotClaimed(str(error)) from error
    else:
        raise NotClaimed(refusal(subject, spec, problem))
    return together(trials)


def together(found: Sequence[Found]) -> Found:
    """What several runs have seen."""
    return Found(
        kernels=tuple(dict.fromkeys(name for one in found for name in one.kernels)),
        deviations=tuple(item for one in found for item in one.deviations),
        outputs=[array for one in found for array in one.outputs],
    )


def claims(subject: Subject, spec: OpSpec, problem: Problem) -> Candidates:
    """The kernels that take a problem, and those that do not; raises Failure for a decline without a reason."""
    found = Resolver(subject.info.name, subject.kernels, {}).candidates(spec.name, problem)
    for item in found.rejected:
        require(
            isinstance(item.reason, str) and item.reason.strip(),
            f"kernel {item.kernel} declines {problem.describe()} without a reason; `supports` returns None or a reason",
        )
    return found


def refusal(subject: Subject, spec: OpSpec, problem: Problem) -> str:
    """Why no kernel takes a problem."""
    found = claims(subject, spec, problem)
    return "; ".join(f"{r.kernel}: {r.reason}" for r in found.rejected) or f"the backend has no kernel of {spec.name}"


class Expected:
    """A case with what its reference gives, in float64 and as a reference run."""

    def __init__(self, prepared: OpCase) -> None:
        self.prepared = prepared

    @cached_property
    def exact(self) -> dict[str, HostArray]:
        return named_outputs(self.prepared.spec, run_reference(self.prepared.spec, self.prepared.case, EXACT))

    @cached_property
    def run(self) -> dict[str, HostArray]:
        spec, case = self.prepared.spec, self.prepared.case
        return named_outputs(spec, run_reference(spec, case, Numerics.of(case.problem.dtype, spec.accumulate)))

    def compare(self, kernel: str, result: Any) -> list[Deviation]:
        """How far each output is off; raises Failure for the first that is too far."""
        spec, case = self.prepared.spec, self.prepared.case
        got = named_outputs(spec, result)
        if got.keys() != self.exact.keys():
            fail(f"{kernel} returns outputs {', '.join(got)}, the op {', '.join(self.exact)}")
        for name, exact in self.exact.items():
            reason = spec.tolerance_of(name).check(case.problem, got[name], exact, self.run[name])
            require(reason is None, f"{kernel}, output {name}: {reason} [{case.problem.describe()}]")
        return [
            deviation(spec.tolerance, case.problem, kernel, name, got[name], exact.astype(np.float64), self.run[name])
            for name, exact in self.exact.items()
            if not spec.tolerance_of(name).exact and exact.dtype.kind not in "iub"
        ]


def deviation(
    tolerance: Tolerance, problem: Problem, kernel: str, output: str, got: HostArray, exact: HostArray, run: HostArray
) -> Deviation:
    """The measured errors of an output that is within tolerance."""
    keep = np.isfinite(exact)
    found = {
        norm: (error, allowed) for norm, error, allowed in tolerance.measure(problem, got[keep], exact[keep], run[keep])
    }
    return Deviation(kernel, output, *found.get("L2", (0.0, 0.0)), *found.get("Linf", (0.0, 0.0)))


def run_kernel(subject: Subject, kernels: Sequence[Kernel], name: str, values: Sequence[Expected]) -> Found:
    """Capture a case's program once and replay it with every set of values, then with the first again."""
    deviations: list[Deviation] = []
    outputs: list[HostArray] = []
    first = values[0].prepared
    with first.rig(subject, kernels) as rig:
        if name:
            require(name in rig.kernels, f"the plan holds {', '.join(rig.kernels)}, not {name}, which claims the case")
        name = name or "+".join(rig.kernels)
        for turn, item in enumerate([*values, values[0]]):
            if turn:
                item.prepared.refill(rig)
            done = item.prepared.run(rig)
            try:
                check_arrays(rig, name, item.prepared, done)
                deviations += item.compare(name, done.result)
            except Failure as error:
                raise Failure(TURNS[min(turn, 1)].format(error)) from error
            outputs += done.arrays
        return Found(rig.kernels, tuple(deviations), outputs)


def check_arrays(rig: Rig, kernel: str, prepared: OpCase, done: OpRun) -> None:
    """Shapes and dtypes are those of the op, and operands come out as they went in."""
    planned = [spec for name, spec in rig.planned.outputs[0].items() if not name.startswith(PASSED_ON)]
    for i, (spec, array) in enumerate(zip(planned, done.outputs, strict=True)):
        given = (tuple(array.shape), array.dtype.name)
        require(given == (spec.shape, spec.dtype), f"{kernel}, output {i}: {given}, not {(spec.shape, spec.dtype)}")
    for name, array in done.operands.items():
        require(
            array.tobytes() == np.ascontiguousarray(prepared.operands.inputs[name]).tobytes(),
            f"{kernel} wrote to its operand {name}; operands are read-only",
        )


def _minimum_check(spec: OpSpec, level: int, cases: Book) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        dtypes = subject.capabilities.dtypes
        require(dtypes, "Capabilities.dtypes is empty: a backend executes at least one dtype")
        names: dict[str, None] = {}
        plain = [case.problem for case in cases(spec.name, 0).values() if case.problem.dtype == "float32"]
        for problem in (in_dtype(p, dtype) for dtype in dtypes for p in plain):
            if not is_required(problem, subject.capabilities):
                continue
            taken = claims(subject, spec, problem).taken
            require(taken, f"no kernel for {problem.describe()}: {refusal(subject, spec, problem)}")
            names.update(dict.fromkeys(kernel.name for kernel in taken))
        return Found(tuple(names))

    rule = f"every backend has kernels of {spec.name} for all problems without features, in each of its dtypes"
    return Check(f"L{level}/minimum/{spec.name}", run, rule=rule, op=spec.name, shape_class="minimum")


def is_required(problem: Problem, can: Capabilities) -> bool:
    """Whether a backend of these capabilities must take a problem: it uses no feature, and pages that are listed."""
    pages = getattr(problem, "kv_dtype", problem.dtype) in (problem.dtype, *can.kv_dtypes)
    sized = not can.page_sizes or getattr(problem, "page_size", can.page_sizes[0]) in can.page_sizes
    return pages and sized and not problem.features()


def in_dtype(problem: Problem, dtype: str) -> Problem:
    """A float32 problem as one of another executed dtype; pages of float32 become pages of that dtype."""
    pages = {"kv_dtype": dtype} if getattr(problem, "kv_dtype", "") == "float32" else {}
    return dataclasses.replace(problem, dtype=dtype, **pages)
