"""Compiles every kernel of a backend for every target of its toolchain, in child processes, without the device.

To the runner's pool each cell of the matrix is one check: a compiler that crashes or hangs costs that cell alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

from lineshaft.errors import BackendUnavailable, InvalidValue
from lineshaft_conformance.checks import Check, Found
from lineshaft_conformance.harness.ahead import Outcome, Tried, trials, try_kernel
from lineshaft_conformance.matrix import FAILS, Cell, Matrix, joined
from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.runner.pool import Listed, LoadFailed, Pool, Task
from lineshaft_conformance.runner.run import machine
from lineshaft_conformance.subject import OnDevice, Target
from lineshaft_contract.host import usable_cpus
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.spec import Size

SETS = ("first", "real", "all")
"""Which problems each kernel is compiled for: the first that it takes, those of real models, or its op's cases too. A
kernel that takes no real problem is compiled for cases under any of them."""
LIMIT = 1800.0
"""Seconds for a cell."""

Progress = Callable[[int, int, Result], None]
"""Called with how many cells are done, how many there are, and the latest: a failure if a problem of it fails."""


def compile_matrix(
    targets: Sequence[Target],
    devices: Sequence[str] = (),
    only: Sequence[str] = (),
    problems: str = "all",
    jobs: int | None = None,
    limit: float | None = None,
    progress: Progress = lambda done, total, result: None,
) -> Matrix:
    """Compile the kernels of some backends, or those of `only` (names or shell patterns), for `devices`, which are
    targets of any of the backends (default: all). `problems` is one of SETS, `limit` in seconds for each cell.

    Raises UnknownBackend, BackendUnavailable for one that does not load, InvalidValue.
    """
    began, make = time.monotonic(), partial(_pool, problems=problems, jobs=jobs, limit=limit)
    with ExitStack() as stack:
        pools, lost = open_pools(stack, targets, make, partly=bool(devices))
        chosen = share_out({name: pool.checks for name, pool in pools.items()}, devices, only, lost)
        total, before, parts = sum(map(len, chosen.values())), 0, []
        for target in sorted(targets, key=lambda target: bool(chosen.get(target.backend))):  # those without work first
            if own := chosen.get(target.backend):
                shown = partial(_shown, progress, before, total)
                parts.append(compile_own(target, pools[target.backend], own, shown))
                before += len(own)
            if target.backend in pools:
                pools[target.backend].end()
    if not parts:
        raise InvalidValue("no kernel is left to compile; ask for more targets or kernels")
    matrix, seconds = joined(parts), round(time.monotonic() - began, 1)
    return replace(matrix, facts={**matrix.facts, "problems": problems, "seconds": seconds, "left_out": lost})


def _pool(target: Target, problems: str, jobs: int | None, limit: float | None) -> Pool:
    return Pool(
        replace(target, ahead=True), jobs=jobs or usable_cpus(), limit=limit, start_limit=600.0,
        collect=f"{__name__}:collect_{problems}",
    )  # fmt: skip


def open_pools(
    stack: ExitStack, targets: Sequence[Target], make: Callable[[Target], Pool], *, partly: bool
) -> tuple[dict[str, Pool], dict[str, str]]:
    """A pool for each backend, and why there is none of some: `partly` lets those be left out of several."""
    pools, lost = {}, {}
    for target in targets:
        try:
            pools[target.backend] = stack.enter_context(make(target))
        except LoadFailed as error:
            lost[target.backend] = f"the backend {target.backend!r} does not load: {error}; mend its plugin"
        except (BackendUnavailable, InvalidValue) as error:
            if len(targets) == 1:
                raise
            lost[target.backend] = str(error)
    if lost and not (partly and pools):
        raise BackendUnavailable("; ".join(lost.values()))
    return pools, lost


def _shown(progress: Progress, before: int, total: int, done: int, result: Result) -> None:
    progress(before + done, total, result)


def compile_own(
    target: Target, pool: Pool, chosen: Sequence[Listed], progress: Callable[[int, Result], None]
) -> Matrix:
    """One backend's cells."""
    order = {check.id: number for number, check in enumerate(chosen)}
    found: dict[int, tuple[Cell, tuple[str, ...]]] = {}
    for task, result in pool.run([Task(check, 0) for check in chosen]):
        cell, columns = cell_of(task.check, result)
        found[order[task.check.id]] = (cell, columns)
        failed = Status.FAIL if cell.outcome == FAILS else Status.PASS
        progress(len(found), replace(result, status=failed))
    facts = {**machine(), "requires": pool.backend["requirements"]}
    cells = [found[number] for number in sorted(found)]
    columns = tuple(dict.fromkeys(name for _, names in cells for name in names))
    asked = tuple(dict.fromkeys(cell.target for cell, _ in cells))
    return Matrix(target.backend, dict(target.options), asked, columns, tuple(cell for cell, _ in cells), facts)


def share_out(
    checks: Mapping[str, Sequence[Listed]], devices: Sequence[str], only: Sequence[str], lost: Mapping[str, str]
) -> dict[str, list[Listed]]:
    """The cells to compile, by backend. Raises InvalidValue for an unknown target or kernel, and for a target of two
    backends."""
    every = [check for own in checks.values() for check in own]
    for what, index, wanted in (("target", 0, devices), ("kernel", 1, only)):
        known = list(dict.fromkeys(place(check)[index] for check in every))
        for name in wanted:
            if not any(fnmatchcase(each, name) for each in known):
                there = "; ".join([f"there are {', '.join(known) or 'none'}", *lost.values()])
                raise InvalidValue(f"no {what} has the name or pattern {name!r}; {there}")

    def fits(name: str, patterns: Sequence[str]) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    def mine(own: Sequence[Listed]) -> list[Listed]:
        return [check for check in own if fits(place(check)[0], devices) and fits(place(check)[1], only)]

    chosen = {name: mine(own) for name, own in checks.items()}
    by_target: dict[str, set[str]] = {}
    for name, own in chosen.items():
        for check in own:
            by_target.setdefault(place(check)[0], set()).add(name)
    for device, names in by_target.items():
        if len(names) > 1:
            raise InvalidValue(f"target {device!r} is one of {' and '.join(sorted(names))}; choose one by --backend")
    return chosen


def place(check: Listed) -> tuple[str, str]:
    """The target and the kernel of a cell."""
    return check.shape_class, check.rule


def collect(problems: str, subject: OnDevice, size: Size, level: int) -> Iterator[Check]:
    """One check per kernel and target, for the pool; it tells what became of each problem as a note."""
    devices = list(subject.toolchain.targets())
    kernels = {kernel.name: kernel.op for device in devices for kernel in subject.on(device).kernels}
    for name, op in sorted(kernels.items(), key=lambda item: list(subject.ops).index(item[1])):
        for device in devices:
            id = f"L0/{op}/{name}/{device}"
            run = partial(compile_cell, problems, device, name)
            yield Check(id, run, rule=name, op=op, shape_class=device, limit=LIMIT, compiled_only=True)


collect_first, collect_real, collect_all = (partial(collect, problems) for problems in SETS)


def compile_cell(problems: str, device: str, name: str, subject: OnDevice, seed: int) -> Found:
    """What became of each problem of a kernel on a target, with the toolchain's columns, as JSON in a note."""
    on = subject.on(device)
    kernel = next((kernel for kernel in on.kernels if kernel.name == name), None)
    if kernel is None:
        tried = [Tried("none", "", Outcome.DECLINES, f"the backend has no such kernel on {device}")]
    else:
        tried = list(tries(on, kernel, problems))
    told = {"columns": list(on.toolchain.columns()), "problems": [each.to_json() for each in tried]}
    return Found(notes=(json.dumps(told),))


def tries(on: OnDevice, kernel: Kernel, problems: str) -> Iterator[Tried]:
    """What becomes of a kernel on the problems of a set, each of SETS."""
    taken = False
    for trial in trials(on, kernel):
        if taken and (problems == "first" or (problems == "real" and not trial.id.startswith("real/"))):
            return
        tried = try_kernel(on, kernel, trial)
        taken = taken or tried.outcome in (Outcome.COMPILED, Outcome.FAILS)
        yield tried


def cell_of(check: Listed, result: Result) -> tuple[Cell, tuple[str, ...]]:
    """The cell and the columns of its figures."""
    device, kernel = place(check)
    cell = Cell(kernel, check.op, device, seconds=result.seconds)
    if result.status is not Status.PASS:
        return replace(cell, reason=result.reason), ()
    told = json.loads(result.notes[0])
    return replace(cell, problems=tuple(told["problems"])), tuple(told["columns"])
