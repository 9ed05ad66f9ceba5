"""L0: a backend with a toolchain compiles its kernels for devices that are not here, and runs nothing there.

At the size smoke each kernel is compiled for one problem, at full for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from lineshaft.errors import InvalidValue, LayoutError, Unsupported
from lineshaft_conformance.checks import Check, Found, NotClaimed, expect, fail, require
from lineshaft_conformance.harness.ahead import FIGURES, Outcome, stated, trials, try_kernel
from lineshaft_conformance.harness.rig import Rig
from lineshaft_conformance.harness.world import mesh_axes
from lineshaft_conformance.subject import OnDevice, Subject
from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import OpSpec
from lineshaft_contract.ops.spec import Size

BEYOND = 2**20
"""Ranks that no target holds."""
NOWHERE = "no-such-target"


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    rule = "a toolchain names its targets, and refuses unknown ones and layouts that they cannot hold"
    yield Check("L0/ahead/targets", _targets, rule=rule, shape_class="ahead", limit=300.0, compiled_only=True)
    for device in _devices(subject):
        for spec in subject.ops.values():
            yield _kernels_check(spec, device, size)


def _devices(subject: Subject) -> list[str]:
    """The targets; none of a toolchain that cannot tell, which is the failure of the check above."""
    try:
        return [str(name) for name in subject.toolchain.targets()] if subject.info.toolchain else []
    except Exception:
        return []


def require_toolchain(subject: Subject) -> None:
    """Raises NotClaimed for a backend without one."""
    if not subject.info.toolchain:
        raise NotClaimed("the backend registers no toolchain")


def _targets(subject: Subject, seed: int) -> Found:
    require_toolchain(subject)
    toolchain = subject.toolchain
    targets, columns = list(toolchain.targets()), list(toolchain.columns())
    require(targets, "the toolchain lists no target")
    for what, names in (("targets", targets), ("columns", columns)):
        words = all(isinstance(name, str) and name.strip() for name in names)
        require(words and len(set(names)) == len(names), f"{what}() = {names}: different names that are not empty")
    expect(InvalidValue, partial(toolchain.start, NOWHERE, World(threads=1)), f"start of the target {NOWHERE!r}")
    huge = World(axes=mesh_axes(tp=BEYOND), threads=1, ranks=BEYOND if subject.info.single_program else 1)
    for device in targets:
        name = subject.on(device).backend.name
        require(name == subject.info.name, f"on {device} the backend calls itself {name!r}, not {subject.info.name!r}")
        expect(LayoutError, partial(toolchain.start, device, huge), f"start of {BEYOND} ranks on {device}")
    return Found(notes=(f"targets {', '.join(targets)}",))


def _kernels_check(spec: OpSpec, device: str, size: Size) -> Check:
    def run(subject: Subject, seed: int) -> Found:
        require_toolchain(subject)
        on = subject.on(device)
        own = [kernel for kernel in on.kernels if kernel.op == spec.name]
        if not own:
            raise NotClaimed(f"the backend has no kernel of {spec.name} on {device}")
        declined = {kernel.name: _compile(on, kernel, size) for kernel in own}
        names = tuple(name for name, reason in declined.items() if not reason)
        reasons = tuple(f"{name} declines: {reason}" for name, reason in declined.items() if reason)
        if not names:
            raise NotClaimed("; ".join(reasons))
        return Found(names, notes=reasons)

    return Check(
        f"L0/ahead/{spec.name}/{device}", run, rule="every kernel compiles for every target that it does not decline",
        op=spec.name, shape_class="ahead", limit=300.0 if size == "smoke" else 3600.0, compiled_only=True,
    )  # fmt: skip


def _compile(on: OnDevice, kernel: Kernel, size: Size) -> str:
    """Compile a kernel for the first problem that it takes, at full for each; returns why it declines them all."""
    reasons: list[str] = []
    compiled = False
    for trial in trials(on, kernel, size):
        tried = try_kernel(on, kernel, trial, lambda rig: _require_program(on, rig))
        if tried.outcome is Outcome.FAILS:
            fail(f"{kernel.name} on {on.device}, {trial.id} [{tried.problem}]: {tried.reason}")
        if tried.outcome is Outcome.COMPILED:
            compiled = True
            if size == "smoke":
                break
        else:
            reasons.append(tried.reason)
    return "" if compiled else next(iter(reasons), "there is no problem to try it on")


def _require_program(on: OnDevice, rig: Rig) -> None:
    """Raises Failure unless a program counts as the contract says, and is not run."""
    report = rig.programs[0].report
    for name in FIGURES:
        value = getattr(report, name)
        counted = isinstance(value, int) or name == "seconds"
        require(counted and math.isfinite(value) and value >= 0, f"CaptureReport.{name} = {value!r}")
    further = sorted(report.details.keys() - set(on.toolchain.columns()))
    require(not further, f"CaptureReport.details has {', '.join(further)}, which columns() does not name")
    stated(rig)
    expect(Unsupported, lambda: rig.submit({}), "a call of a program that was compiled for a device that is not here")
