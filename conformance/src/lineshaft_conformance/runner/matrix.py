"""Compiles every kernel of a backend for every target of its toolchain, in child processes, without the device.

To the runner's pool each cell of the matrix is one check: a compiler that crashes or hangs costs that cell alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

from lineshaft.errors import BackendUnavailable, InvalidValue
from lineshaft_conformance.checks import Check, Found
from lineshaft_conformance.harness.ahead import trials, try_kernel
from lineshaft_conformance.matrix import FAILS, Cell, Matrix
from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.runner.pool import Listed, LoadFailed, Pool, Task
from lineshaft_conformance.runner.run import machine
from lineshaft_conformance.subject import OnDevice, Target
from lineshaft_contract.host import usable_cpus
from lineshaft_contract.ops.spec import Size

COLLECT = "lineshaft_conformance.runner.matrix:collect"
LIMIT = 1800.0
"""Seconds for a cell."""

Progress = Callable[[int, int, Result], None]
"""Called with how many cells are done, how many there are, and the latest: a failure if a problem of it fails."""


def compile_matrix(
    target: Target,
    devices: Sequence[str] = (),
    only: Sequence[str] = (),
    jobs: int | None = None,
    limit: float | None = None,
    progress: Progress = lambda done, total, result: None,
) -> Matrix:
    """Compile the backend's kernels, or those of `only` (names or shell patterns), for the targets `devices` (default:
    all). `limit` is in seconds for each cell.

    Raises UnknownBackend, BackendUnavailable for one that does not load, InvalidValue.
    """
    try:
        with Pool(
            replace(target, ahead=True), jobs=jobs or usable_cpus(), limit=limit, start_limit=600.0, collect=COLLECT
        ) as pool:  # fmt: skip
            chosen = choose(pool.checks, devices, only)
            order = {check.id: number for number, check in enumerate(chosen)}
            found: dict[int, tuple[Cell, tuple[str, ...]]] = {}
            for task, result in pool.run([Task(check, 0) for check in chosen]):
                cell, columns = cell_of(task.check, result)
                found[order[task.check.id]] = (cell, columns)
                failed = Status.FAIL if cell.outcome == FAILS else Status.PASS
                progress(len(found), len(chosen), replace(result, status=failed))
            facts = {**machine(), "requires": pool.backend["requirements"]}
    except LoadFailed as error:
        raise BackendUnavailable(f"the backend {target.backend!r} does not load: {error}; mend its plugin") from error
    cells = [found[number] for number in sorted(found)]
    columns = tuple(dict.fromkeys(name for _, names in cells for name in names))
    asked = tuple(dict.fromkeys(cell.target for cell, _ in cells))
    return Matrix(target.backend, dict(target.options), asked, columns, tuple(cell for cell, _ in cells), facts)


def choose(checks: Sequence[Listed], devices: Sequence[str], only: Sequence[str]) -> list[Listed]:
    """The cells to compile. Raises InvalidValue for an unknown target or kernel."""
    for what, index, wanted in (("target", 0, devices), ("kernel", 1, only)):
        known = list(dict.fromkeys(place(check)[index] for check in checks))
        for name in wanted:
            if not any(fnmatchcase(each, name) for each in known):
                raise InvalidValue(
                    f"no {what} has the name or pattern {name!r}; there are {', '.join(known) or 'none'}"
                )

    def fits(name: str, patterns: Sequence[str]) -> bool:
        return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)

    return [check for check in checks if fits(place(check)[0], devices) and fits(place(check)[1], only)]


def place(check: Listed) -> tuple[str, str]:
    """The target and the kernel of a cell."""
    return check.shape_class, check.rule


def collect(subject: OnDevice, size: Size, level: int) -> Iterator[Check]:
    """One check per kernel and target, for the pool; it tells what became of each problem as a note."""
    devices = list(subject.toolchain.targets())
    kernels = {kernel.name: kernel.op for device in devices for kernel in subject.on(device).kernels}
    for name, op in sorted(kernels.items(), key=lambda item: list(subject.ops).index(item[1])):
        for device in devices:
            id = f"L0/{op}/{name}/{device}"
            run = partial(compile_cell, device, name)
            yield Check(id, run, rule=name, op=op, shape_class=device, limit=LIMIT, compiled_only=True)


def compile_cell(device: str, name: str, subject: OnDevice, seed: int) -> Found:
    """What became of each problem of a kernel on a target, with the toolchain's columns, as JSON in a note."""
    on = subject.on(device)
    kernel = next((kernel for kernel in on.kernels if kernel.name == name), None)
    tried = [] if kernel is None else [try_kernel(on, kernel, trial).to_json() for trial in trials(on, kernel)]
    return Found(notes=(json.dumps({"columns": list(on.toolchain.columns()), "problems": tried}),))


def cell_of(check: Listed, result: Result) -> tuple[Cell, tuple[str, ...]]:
    """The cell and the columns of its figures."""
    device, kernel = place(check)
    cell = Cell(kernel, check.op, device, seconds=result.seconds)
    if result.status is not Status.PASS:
        return replace(cell, reason=result.reason), ()
    told = json.loads(result.notes[0])
    return replace(cell, problems=tuple(told["problems"])), tuple(told["columns"])
