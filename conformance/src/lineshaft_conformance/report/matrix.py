"""Tables of a matrix of kernels and targets: text for a terminal, Markdown for a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lineshaft.cli.table import table
from lineshaft_conformance.amounts import human
from lineshaft_conformance.matrix import COMPILED, FAILS, Cell, Matrix


def text(matrix: Matrix) -> str:
    """The matrix with what it means, then a line for each failure and for each kernel that takes nothing."""
    lines = [table(header(matrix), rows(matrix)), "", legend(matrix)]
    lines += [f"FAILS {cell.kernel} for {cell.target}: {cell.why}" for cell in matrix.failures]
    lines += [
        f"{name} declines every problem on every target: {first_reason(matrix, name)}" for name in matrix.declined
    ]
    return "\n".join(lines)


def markdown(matrix: Matrix) -> str:
    """The same as a Markdown table; a cell that did not compile has its reason."""
    body = [header(matrix), ["---"] * (len(matrix.targets) + 2), *rows(matrix, reasons=True)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body]
    return "\n".join([*lines, "", legend(matrix), ""])


def header(matrix: Matrix) -> Sequence[str]:
    return ("OP", "KERNEL", *matrix.targets)


def rows(matrix: Matrix, *, reasons: bool = False) -> list[Sequence[str]]:
    by_place = {(cell.kernel, cell.target): cell for cell in matrix.cells}
    ops = {cell.kernel: cell.op for cell in matrix.cells}

    def shown(name: str, target: str) -> str:
        return cell_text(matrix, by_place[name, target], reasons=reasons) if (name, target) in by_place else "-"

    return [(ops[name], name, *(shown(name, target) for target in matrix.targets)) for name in matrix.kernels]


def cell_text(matrix: Matrix, cell: Cell, *, reasons: bool) -> str:
    """ "3: temporaries 0 B, vmem 12.00 KiB, mxu 1": the problems compiled, and of the first of them what it takes."""
    if cell.outcome != COMPILED:
        word = "FAILS" if cell.outcome == FAILS else cell.outcome
        return f"{word}: {cell.why}" if reasons else word
    figures = cell.compiled[0]["figures"]
    shown = [figure("temporaries_bytes", figures["temporaries"])]
    shown += [figure(name, figures[name]) for name in matrix.columns if name in figures]
    return f"{len(cell.compiled)}: {', '.join(shown)}"


def figure(name: str, value: Any) -> str:
    """A figure with its name; one whose name ends in "_bytes" in a unit to read."""
    title = name.removesuffix("_bytes")
    return f"{title} {value if title == name else human(value)}"


def legend(matrix: Matrix) -> str:
    return (
        f"{matrix.backend}: {len(matrix.kernels)} kernels, {len(matrix.targets)} targets, {len(matrix.failures)} cells "
        "fail. A cell: how many problems were compiled, and figures of the first, which is a real model's where there "
        "is one. Evidence: compiled-only"
    )


def first_reason(matrix: Matrix, kernel: str) -> str:
    return next(cell.why for cell in matrix.cells if cell.kernel == kernel)
