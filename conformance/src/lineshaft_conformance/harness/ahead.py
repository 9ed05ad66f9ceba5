"""Compiling kernels for devices that are not here: which problems to try, and what becomes of each.

A kernel is tried on the real problems that its toolchain names, and on one case of its op for each dtype and set of
features. Nothing is run, and nothing here knows a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np

from lineshaft.errors import LayoutError
from lineshaft.plan.resolve import Resolver
from lineshaft.registry.loading import one_line
from lineshaft_conformance.checks import Failure
from lineshaft_conformance.harness.abstract import MAKERS, zero_case
from lineshaft_conformance.harness.op_case import OpCase, prepare
from lineshaft_conformance.harness.rig import Rig
from lineshaft_conformance.harness.world import Collective, Exchange, mesh_axes
from lineshaft_conformance.subject import OnDevice
from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import OpSpec
from lineshaft_contract.ops.spec import Size
from lineshaft_contract.problems import CollectiveProblem, Problem
from lineshaft_contract.sessions import CaptureReport

FIGURES = ("seconds", "arguments", "outputs", "temporaries", "aliased", "code", "flops", "moved")
"""Fields of a CaptureReport that are stored of each compilation, beside its details."""
STATICS: Mapping[str, tuple[str, ...]] = {
    "all_gather": ("dim",), "reduce_scatter": ("dim",), "all_to_all": ("dim", "concat_dim"), "broadcast": ("src",),
    "permute": ("shift",),
}  # fmt: skip
"""Fields of a collective's problem that its call gives by position, after the axis."""


class Outcome(StrEnum):
    """What becomes of a kernel on a problem, or of all its problems on a device."""

    COMPILED = "compiled"
    DECLINES = "declines"
    FAILS = "fails"
    UNTRIED = "untried"  # a real problem of an op whose operands the suite cannot make


@dataclass(frozen=True)
class Trial:
    """One problem to compile a kernel for. `make` gives a frozen rig with its program, on a device."""

    id: str
    problem: Problem
    make: Callable[[OnDevice, Kernel], Rig]


@dataclass(frozen=True)
class Tried:
    """What became of a trial; `report` is the compiler's, of one that compiled."""

    id: str
    problem: str
    outcome: Outcome
    reason: str = ""
    report: CaptureReport | None = None

    def to_json(self) -> dict[str, Any]:
        figures = {}
        if self.report is not None:
            given = asdict(self.report)
            figures = {name: given[name] for name in FIGURES} | dict(self.report.details)
        return {
            "id": self.id, "problem": self.problem, "outcome": str(self.outcome), "reason": self.reason,
            "figures": figures,
        }  # fmt: skip


def trials(on: OnDevice, kernel: Kernel, size: Size = "smoke") -> Iterator[Trial]:
    """The real problems of a kernel first, then one case of its op for each dtype and set of features."""
    spec = on.ops[kernel.op]
    for number, problem in enumerate(on.toolchain.problems(kernel)):
        yield real_trial(spec, f"real/{number}", problem)
    cases = on.keep(("ahead", spec.name, size), lambda: distinct_cases(spec, size))
    yield from cases


def real_trial(spec: OpSpec, id: str, problem: Problem) -> Trial:
    """Raises Failure for a problem that is none of the op's."""
    if type(problem) is not spec.problem:
        raise Failure(
            f"Toolchain.problems names a {type(problem).__name__} for a kernel of {spec.name}, whose problem is a "
            f"{spec.problem.__name__}"
        )
    if isinstance(problem, CollectiveProblem):
        return collective_trial(spec, id, problem)

    def make(on: OnDevice, kernel: Kernel) -> Rig:
        case = zero_case(spec.name, problem)
        assert case is not None, f"no operands for {spec.name}"
        return compiled(prepare(spec, case), on, kernel)

    return Trial(id, problem, make)


def distinct_cases(spec: OpSpec, size: Size) -> list[Trial]:
    """The first case of each dtype, scheme and set of features."""
    found: dict[tuple[Any, ...], Trial] = {}
    for case in spec.cases(np.random.default_rng(0), size):
        p = case.problem
        schemes = [getattr(p, name, "") for name in ("kv_dtype", "kv_scheme", "scheme", "size")]
        key = (p.dtype, *schemes, p.features())
        if key in found:
            continue
        if isinstance(p, CollectiveProblem):
            found[key] = collective_trial(spec, case.id, p)
        else:
            found[key] = Trial(case.id, p, partial(compiled, prepare(spec, case)))
    return list(found.values())


def compiled(prepared: OpCase, on: OnDevice, kernel: Kernel) -> Rig:
    """The case with this kernel, and those of other ops for what a composite's default calls."""
    return prepared.compiled(on, [kernel, *(other for other in on.kernels if other.op != kernel.op)])


def collective_trial(spec: OpSpec, id: str, problem: CollectiveProblem) -> Trial:
    """A collective over tp, on a world of as many ranks as the problem has members."""
    statics = tuple(getattr(problem, name) for name in STATICS.get(spec.name, ()))
    exchange = Exchange(problem.dtype, problem.shape, (Collective(spec.name, ("tp",), statics),))

    def make(on: OnDevice, kernel: Kernel) -> Rig:
        axes = mesh_axes(tp=problem.size)
        world = World(axes=axes, threads=1, ranks=problem.size if on.info.single_program else 1)
        backend = on.start(world)
        own = next((each for each in on.kernels_of(backend) if each.name == kernel.name), kernel)
        return Rig(on, [exchange.program()], kernels=[own], degrees=dict(axes), session=backend.session(0))

    return Trial(id, problem, make)


def refusal(on: OnDevice, kernel: Kernel, problem: Problem) -> str | None:
    """Why the kernel does not take a problem on this device; None if it does. Raises Failure for an empty reason."""
    if problem.dtype not in on.capabilities.dtypes:
        return f"dtype {problem.dtype} is not among Capabilities.dtypes ({', '.join(on.capabilities.dtypes)})"
    if isinstance(problem, CollectiveProblem) and problem.size > 1 and not on.capabilities.collectives:
        return "Capabilities.collectives is False"
    rejected = Resolver(on.info.name, [kernel], {}).candidates(kernel.op, problem).rejected
    if not rejected:
        return None
    reason = rejected[0].reason
    if not isinstance(reason, str) or not reason.strip():
        raise Failure(f"kernel {kernel.name} declines {problem.describe()} without a reason")
    return reason


def stated(rig: Rig) -> None:
    """Raises Failure where a report's own details say that the code is not what was stated beforehand, see
    `Toolchain.columns`."""
    details = rig.programs[0].report.details
    expected, found = (set(str(details.get(name, "none")).split("+")) - {"none"} for name in ("expected", "found"))
    if missing := sorted(expected - found):
        raise Failure(
            f"expects the matrix instructions {', '.join(missing)} and has {', '.join(sorted(found)) or 'none'}"
        )
    if details.get("default") != "no":
        for name in ("spills", "stack_bytes"):
            if details.get(name, 0) != 0:
                raise Failure(f"{name} = {details[name]} in a default configuration")


def try_kernel(on: OnDevice, kernel: Kernel, trial: Trial, look: Callable[[Rig], None] = stated) -> Tried:
    """Compile a kernel for a trial on a device, and `look` at the rig; whatever is raised becomes the reason."""
    described = trial.problem.describe()
    try:
        declined = refusal(on, kernel, trial.problem)
        if declined is not None:
            return Tried(trial.id, described, Outcome.DECLINES, " ".join(declined.split()))
        if trial.id.startswith("real/") and kernel.op not in MAKERS and not on.ops[kernel.op].collective:
            reason = f"the suite makes no operands of {kernel.op} for problems without a case"
            return Tried(trial.id, described, Outcome.UNTRIED, reason)
        with trial.make(on, kernel) as rig:
            if kernel.name not in rig.kernels:
                raise Failure(f"the plan holds {', '.join(rig.kernels)}, not {kernel.name}, which takes the problem")
            look(rig)
            return Tried(trial.id, described, Outcome.COMPILED, report=rig.programs[0].report)
    except LayoutError as error:
        return Tried(trial.id, described, Outcome.DECLINES, f"the target cannot hold it: {one_line(error)}")
    except Failure as failure:
        return Tried(trial.id, described, Outcome.FAILS, str(failure))
    except Exception as error:
        return Tried(trial.id, described, Outcome.FAILS, one_line(error))
