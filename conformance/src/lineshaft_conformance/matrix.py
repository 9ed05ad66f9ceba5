"""Which kernel of a backend compiles for which target: plain data, and what got worse since another time.

Knows no backend; all of it is *compiled-only*.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lineshaft.errors import InvalidValue

COMPILED, DECLINES, FAILS = "compiled", "declines", "fails"
NEVER = ("spills", "stack_bytes")
"""Figures that do not rise from 0 unnoticed."""
GROWTH: Mapping[str, tuple[float, int]] = {"registers": (0.1, 8), "shared_bytes": (0.1, 1024)}
"""Figures that do not grow by more than both this share and this many: another version of a compiler moves them too."""
CLASSES = "found"
"""The figure that joins classes of instructions by "+", none of which is lost unnoticed."""


@dataclass(frozen=True)
class Cell:
    """A kernel on a target. `problems` holds each with its id, outcome, reason and figures; a cell without any is that
    of a process which broke."""

    kernel: str
    op: str
    target: str
    reason: str = ""
    problems: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        """fails where one problem does, else compiled where one does, else declines."""
        found = {problem["outcome"] for problem in self.problems}
        if FAILS in found or self.reason:
            return FAILS
        return COMPILED if COMPILED in found else DECLINES

    @property
    def compiled(self) -> tuple[Mapping[str, Any], ...]:
        """The problems that compiled, those of real models first."""
        return tuple(problem for problem in self.problems if problem["outcome"] == COMPILED)

    @property
    def why(self) -> str:
        """What failed first, or why the first problem was declined; "" where all is well."""
        if self.reason or self.outcome == COMPILED:
            return self.reason
        bad = [problem for problem in self.problems if problem["outcome"] != COMPILED]
        first = next((problem for problem in bad if problem["outcome"] == self.outcome), next(iter(bad), None))
        if first is None:
            return "there is no problem to try it on"
        return f"{first['id']} [{first['problem']}]: {first['reason']}" if first["id"] else str(first["reason"])

    def worse(self, before: Cell) -> Iterator[str]:
        """What is worse than before about the first problem that compiled then."""
        was = before.compiled[0]
        now = next((problem for problem in self.compiled if problem["problem"] == was["problem"]), None)
        if now is None:
            yield f"does not compile [{was['problem']}] any more"
            return
        old, new = was["figures"], now["figures"]
        for name in NEVER:
            if old.get(name) == 0 and new.get(name, 0) > 0:
                yield f"{name} rose from 0 to {new[name]} [{was['problem']}]"
        for name, (share, least) in GROWTH.items():
            if name in old and name in new and new[name] - old[name] > max(least, share * old[name]):
                yield f"{name} grew from {old[name]} to {new[name]} [{was['problem']}]"
        lost = {*str(old.get(CLASSES, "none")).split("+")} - {*str(new.get(CLASSES, "none")).split("+"), "none"}
        if lost:
            yield f"{', '.join(sorted(lost))} is not in its code any more [{was['problem']}]"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}


@dataclass(frozen=True)
class Matrix:
    """All cells of a run, kernel by kernel; `columns` are the keys of figures that the toolchain adds. `backend` names
    several as "a, b"."""

    backend: str
    options: Mapping[str, Any]
    targets: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.kernel for cell in self.cells))

    @property
    def failures(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.outcome == FAILS)

    @property
    def declined(self) -> tuple[str, ...]:
        """The kernels that decline every problem on every target."""
        taken = {cell.kernel for cell in self.cells if cell.outcome != DECLINES}
        return tuple(name for name in self.kernels if name not in taken)

    def count(self, outcome: str) -> int:
        return sum(cell.outcome == outcome for cell in self.cells)

    def why(self, cell: Cell) -> str:
        """A cell's reason; of one that declines, for the problem that another target takes, if there is one."""
        if cell.outcome != DECLINES:
            return cell.why
        taken = [c.compiled[0]["problem"] for c in self.cells if c.kernel == cell.kernel and c.outcome == COMPILED]
        asked = (problem for problem in cell.problems if problem["problem"] in taken)
        return next((str(problem["reason"]) for problem in asked), cell.why)

    def compared(self, before: Matrix, only: Sequence[str] = ()) -> tuple[Cell, ...]:
        """The cells of an earlier matrix that this one is compared with: those that compiled for a target that is asked
        for now too.

        `only`: names or shell patterns of the kernels that are asked for.
        """
        asked = [cell for cell in before.cells if cell.outcome == COMPILED and cell.target in self.targets]
        return tuple(c for c in asked if not only or any(fnmatchcase(c.kernel, pattern) for pattern in only))

    def regressions(self, before: Matrix, only: Sequence[str] = ()) -> tuple[str, ...]:
        """A line for each cell of `compared` that does not compile now, or whose code is worse by NEVER, GROWTH or
        CLASSES."""
        now = {(cell.kernel, cell.target): cell for cell in self.cells}
        lines = []
        for cell in self.compared(before, only):
            found = now.get((cell.kernel, cell.target))
            if found is None or found.outcome != COMPILED:
                said = "there is no such kernel" if found is None else f"it {found.outcome}: {self.why(found)}"
                lines.append(f"{cell.kernel} compiled for {cell.target}, and now {said}")
            else:
                lines += [f"{cell.kernel} for {cell.target}: {text}" for text in found.worse(cell)]
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend, "options": dict(self.options), "evidence": "compiled-only",
            "targets": list(self.targets), "columns": list(self.columns), "facts": dict(self.facts),
            "cells": [cell.to_json() for cell in self.cells],
        }  # fmt: skip

    def brief(self) -> str:
        """A table in JSON, a line for each cell: the figures of the first problem that compiled, or a reason. It holds
        nothing of the machine, and `load_matrix` reads it too."""
        head = {
            "backend": self.backend, "evidence": "compiled-only", "targets": self.targets, "columns": self.columns,
            "versions": self.facts.get("requires", {}),
        }  # fmt: skip
        lines = ",\n".join(f"  {json.dumps(self._line(cell))}" for cell in self.cells)
        return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'

    def _line(self, cell: Cell) -> dict[str, Any]:
        line = {"kernel": cell.kernel, "op": cell.op, "target": cell.target}
        if cell.outcome != COMPILED:
            return {**line, cell.outcome: self.why(cell)}
        first = cell.compiled[0]
        return (
            line
            | {"problem": first["problem"]}
            | {n: first["figures"][n] for n in self.columns if n in first["figures"]}
        )


def joined(parts: Sequence[Matrix]) -> Matrix:
    """One matrix of several backends' matrices, kernel by kernel."""
    kernels = list(dict.fromkeys(name for part in parts for name in part.kernels))
    cells = sorted((cell for part in parts for cell in part.cells), key=lambda cell: kernels.index(cell.kernel))
    return Matrix(
        ", ".join(part.backend for part in parts),
        {name: value for part in parts for name, value in part.options.items()},
        tuple(dict.fromkeys(target for part in parts for target in part.targets)),
        tuple(dict.fromkeys(name for part in parts for name in part.columns)),
        tuple(cells),
        {**parts[0].facts, "requires": {n: v for part in parts for n, v in part.facts.get("requires", {}).items()}},
    )


def load_matrix(file: Path) -> Matrix:
    """A matrix that was stored, whole or as a table (`Matrix.brief`). Raises InvalidValue."""
    try:
        matrix = matrix_of(json.loads(file.read_text(encoding="utf-8")))
        for cell in matrix.cells:
            check_cell(cell, matrix.columns)
        return matrix
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidValue(
            f"{file} holds no matrix ({type(error).__name__}: {error}); give a file that "
            "`lineshaft kernels compile --out` or `--table` has written"
        ) from error


def matrix_of(data: Mapping[str, Any]) -> Matrix:
    """The matrix of a stored one's plain data."""
    if "rows" in data:
        facts, cells = {"requires": data["versions"]}, [row_cell(row) for row in data["rows"]]
        return Matrix(data["backend"], {}, tuple(data["targets"]), tuple(data["columns"]), tuple(cells), facts)
    cells = [
        Cell(**{name: item[name] for name in ("kernel", "op", "target", "reason", "seconds")},
             problems=tuple(item["problems"]))
        for item in data["cells"]
    ]  # fmt: skip
    return Matrix(
        data["backend"], data["options"], tuple(data["targets"]), tuple(data["columns"]), tuple(cells), data["facts"]
    )


def check_cell(cell: Cell, columns: Sequence[str]) -> None:
    """Raises ValueError for what `Matrix.regressions` cannot compare: another type than that of a name or a figure, and
    figures that are there in part. Backends without registers have none of them."""
    where = f"{cell.kernel} for {cell.target}"
    if not all(isinstance(name, str) for name in (cell.kernel, cell.op, cell.target, cell.reason)):
        raise ValueError(f"{where}: kernel, op, target and reason are strings")
    counted = [name for name in (*NEVER, *GROWTH) if name in columns]
    for problem in cell.problems:
        if problem["outcome"] != COMPILED:
            continue
        figures, text = problem["figures"], problem["problem"]
        absent = [name for name in counted if name not in figures]
        if absent and len(absent) < len(counted):
            raise ValueError(f"{where} [{text}] has no {', '.join(absent)}")
        for name in counted:
            if type(figures.get(name, 0)) not in (int, float):
                raise ValueError(f"{where} [{text}]: {name} = {figures[name]!r} is no number")
        if not isinstance(figures.get(CLASSES, ""), str):
            raise ValueError(f"{where} [{text}]: {CLASSES} = {figures[CLASSES]!r} is no string")


def row_cell(row: Mapping[str, Any]) -> Cell:
    """The cell of a table's line."""
    cell = Cell(row["kernel"], row["op"], row["target"])
    if FAILS in row:
        return replace(cell, reason=row[FAILS])
    if DECLINES in row:
        return replace(cell, problems=({"id": "", "problem": "", "outcome": DECLINES, "reason": row[DECLINES]},))
    figures = {name: value for name, value in row.items() if name not in ("kernel", "op", "target", "problem")}
    return replace(cell, problems=({"id": "", "problem": row["problem"], "outcome": COMPILED, "figures": figures},))
