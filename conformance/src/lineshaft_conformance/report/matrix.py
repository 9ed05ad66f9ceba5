"""Tables of a matrix of kernels and targets: text for a terminal, Markdown for a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lineshaft.cli.table import table
from lineshaft_conformance.amounts import human
from lineshaft_conformance.matrix import CLASSES, COMPILED, DECLINES, FAILS, Cell, Matrix

WORDS = ((COMPILED, "compiled"), (DECLINES, "declined"))
COMPILERS = ("triton", "torch")
HIDDEN = ("expected", "found", "default")
"""Figures that a page need not show once more: the classes expected are those found, in default configurations."""
FEW = 3
"""Columns up to which a kernel has one row with a cell for each target; with more it has a row for each target."""


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
    return "\n".join([*piped(header(matrix), rows(matrix, reasons=True)), "", legend(matrix), ""])


def document(matrix: Matrix) -> str:
    """A matrix for a page: which kernel compiles for which target, with which matrix instructions; why some decline;
    for which problem each was compiled; and its figures."""
    by_place = {(cell.kernel, cell.target): cell for cell in matrix.cells}
    body = [
        (f"`{name}`", *(short(by_place.get((name, target))) for target in matrix.targets)) for name in matrix.kernels
    ]
    shown = [name for name in matrix.columns if name not in HIDDEN]
    compiled = [cell for cell in matrix.cells if cell.outcome == COMPILED]
    figures = [
        (f"`{cell.kernel}`", cell.target, *(amount(name, cell.compiled[0]["figures"].get(name, "-")) for name in shown))
        for cell in compiled
    ]
    problems: dict[tuple[str, str], list[str]] = {}
    for cell in compiled:
        problems.setdefault((cell.kernel, cell.compiled[0]["problem"]), []).append(cell.target)
    asked = [(f"`{kernel}`", f"`{problem}`", ", ".join(places)) for (kernel, problem), places in problems.items()]
    tables = (
        piped(("Kernel", *matrix.targets), body), reasons_of(matrix),
        piped(("Kernel", "Problem", "Targets"), asked), piped(("Kernel", "Target", *map(title, shown)), figures),
    )  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in ([made_with(matrix)], *tables)) + "\n"


def made_with(matrix: Matrix) -> str:
    """The versions of the packages that compiled it, for a page."""
    found = matrix.facts.get("requires", {})
    versions = ", ".join(f"{name} {found[name]}" for name in COMPILERS if name in found)
    return f"Compiled with {versions or 'versions that were not kept'}; another compiler gives other figures."


def short(cell: Cell | None) -> str:
    """What a cell found, or what became of it."""
    if cell is None or cell.outcome != COMPILED:
        return "-" if cell is None else cell.outcome
    found = str(cell.compiled[0]["figures"].get(CLASSES, "none"))
    return COMPILED if found == "none" else found


def reasons_of(matrix: Matrix) -> list[str]:
    """How many cells there are of each kind, and a line for each reason not to compile."""
    total = len(matrix.cells)
    counts = ", ".join(f"{matrix.count(word)} {said}" for word, said in (*WORDS, (FAILS, "failed")))
    by_reason: dict[str, list[str]] = {}
    for cell in matrix.cells:
        if cell.outcome != COMPILED:
            by_reason.setdefault(matrix.why(cell), []).append(f"`{cell.kernel}` for {cell.target}")
    lines = [f"- {reason}: {', '.join(cells)}" for reason, cells in by_reason.items()]
    share = 100 * matrix.count(DECLINES) / max(1, total)
    return [f"{total} cells: {counts} ({share:.1f} % declined).", *(["", *lines] if lines else [])]


def piped(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def wide(matrix: Matrix) -> bool:
    return len(matrix.columns) > FEW


def header(matrix: Matrix) -> Sequence[str]:
    if wide(matrix):
        return ("OP", "KERNEL", "TARGET", "COMPILED", *(title(name).upper() for name in matrix.columns))
    return ("OP", "KERNEL", *matrix.targets)


def rows(matrix: Matrix, *, reasons: bool = False) -> list[Sequence[str]]:
    if wide(matrix):
        return [long_row(matrix, cell, reasons=reasons) for cell in matrix.cells]
    by_place = {(cell.kernel, cell.target): cell for cell in matrix.cells}
    ops = {cell.kernel: cell.op for cell in matrix.cells}

    def shown(name: str, target: str) -> str:
        return cell_text(matrix, by_place[name, target], reasons=reasons) if (name, target) in by_place else "-"

    return [(ops[name], name, *(shown(name, target) for target in matrix.targets)) for name in matrix.kernels]


def long_row(matrix: Matrix, cell: Cell, *, reasons: bool) -> Sequence[str]:
    """A row of a cell: how many problems were compiled, and the figures of the first of them."""
    place = (cell.op, cell.kernel, cell.target)
    if cell.outcome != COMPILED:
        return (*place, outcome_text(matrix, cell, reasons=reasons), *[""] * len(matrix.columns))
    figures = cell.compiled[0]["figures"]
    return (*place, str(len(cell.compiled)), *(amount(name, figures[name]) if name in figures else "-"
            for name in matrix.columns))  # fmt: skip


def outcome_text(matrix: Matrix, cell: Cell, *, reasons: bool) -> str:
    word = "FAILS" if cell.outcome == FAILS else cell.outcome
    return f"{word}: {matrix.why(cell)}" if reasons else word


def cell_text(matrix: Matrix, cell: Cell, *, reasons: bool) -> str:
    """ "3: temporaries 0 B, vmem 12.00 KiB, mxu 1": the problems compiled, and of the first of them what it takes."""
    if cell.outcome != COMPILED:
        return outcome_text(matrix, cell, reasons=reasons)
    figures = cell.compiled[0]["figures"]
    shown = [figure("temporaries_bytes", figures["temporaries"])]
    shown += [figure(name, figures[name]) for name in matrix.columns if name in figures]
    return f"{len(cell.compiled)}: {', '.join(shown)}"


def title(name: str) -> str:
    """What a figure is called; one whose name ends in "_bytes" is shown in a unit to read."""
    return name.removesuffix("_bytes")


def amount(name: str, value: Any) -> str:
    return str(value) if title(name) == name or value == "-" else human(value)


def figure(name: str, value: Any) -> str:
    return f"{title(name)} {amount(name, value)}"


def legend(matrix: Matrix) -> str:
    counts = ", ".join(f"{matrix.count(word)} {said}" for word, said in WORDS)
    share = 100 * matrix.count(DECLINES) / max(1, len(matrix.cells))
    seconds = f", in {matrix.facts['seconds']:g} s" if "seconds" in matrix.facts else ""
    left_out = "".join(f". Left out: {why}" for why in matrix.facts.get("left_out", {}).values())
    return (
        f"{matrix.backend}: {len(matrix.kernels)} kernels, {len(matrix.targets)} targets, {matrix.count(FAILS)} cells "
        f"fail; {counts} ({share:.1f} %){seconds}. A cell: how many problems were compiled, and figures of the first, "
        f"which is a real model's where there is one{left_out}. Evidence: compiled-only"
    )


def first_reason(matrix: Matrix, kernel: str) -> str:
    return next(cell.why for cell in matrix.cells if cell.kernel == kernel)
