"""Which kernel of a backend compiles for which target: plain data, and what got worse since another time.

Knows no backend; all of it is *compiled-only*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lineshaft.errors import InvalidValue

COMPILED, DECLINES, FAILS = "compiled", "declines", "fails"


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
        return f"{first['id']} [{first['problem']}]: {first['reason']}" if first else "there is no problem to try it on"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}


@dataclass(frozen=True)
class Matrix:
    """All cells of a run, kernel by kernel; `columns` are the keys of figures that the toolchain adds."""

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

    def regressions(self, before: Matrix, only: Sequence[str] = ()) -> tuple[str, ...]:
        """A line for each kernel that compiled before, for a target that is asked for now too, and does not now.

        `only`: names or shell patterns of the kernels that are asked for.
        """
        now = {(cell.kernel, cell.target): cell for cell in self.cells}
        lines = []
        for cell in before.cells:
            asked = not only or any(fnmatchcase(cell.kernel, pattern) for pattern in only)
            if asked and cell.outcome == COMPILED and cell.target in self.targets:
                found = now.get((cell.kernel, cell.target))
                if found is None or found.outcome != COMPILED:
                    said = "there is no such kernel" if found is None else f"it {found.outcome}: {found.why}"
                    lines.append(f"{cell.kernel} compiled for {cell.target}, and now {said}")
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "backend": self.backend, "options": dict(self.options), "evidence": "compiled-only",
            "targets": list(self.targets), "columns": list(self.columns), "facts": dict(self.facts),
            "cells": [cell.to_json() for cell in self.cells],
        }  # fmt: skip


def load_matrix(file: Path) -> Matrix:
    """A matrix that was stored. Raises InvalidValue."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        cells = [
            Cell(**{name: item[name] for name in ("kernel", "op", "target", "reason", "seconds")},
                 problems=tuple(item["problems"]))
            for item in data["cells"]
        ]  # fmt: skip
        return Matrix(
            data["backend"], data["options"], tuple(data["targets"]), tuple(data["columns"]), tuple(cells),
            data["facts"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidValue(
            f"{file} holds no matrix ({type(error).__name__}: {error}); give a file that "
            "`lineshaft kernels compile --out` has written"
        ) from error
