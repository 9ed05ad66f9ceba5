"""`lineshaft compile`: compiles a run's programs for devices that are not here, and says whether it fits on them."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lineshaft.cli.options import add_config_arguments, check_writable, load_config
from lineshaft.cli.table import table
from lineshaft_conformance.amounts import amount, human

if TYPE_CHECKING:
    from lineshaft_conformance.ahead import Compiled, CompiledProgram

HELP = "compile all programs of a run ahead of time, without the device, and say what memory they need"
HEADER = (
    "PROGRAM", "TOKENS", "ROWS", "PAGES", "LOGITS", "ARGUMENTS", "OUTPUTS", "TEMPORARIES", "ALIASED", "FLOPS", "MOVED",
    "SECONDS", "CACHED",
)  # fmt: skip
FEW = 3
"""Programs after which what remains can be estimated."""


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--topology", metavar="NAME", required=True, help="the devices to compile for, as the backend spells them")
    add(
        "--programs", metavar="PATTERN", action="append", default=[],
        help="compile only programs of this name or shell pattern, such as 'forward/*-q1'; repeatable",
    )  # fmt: skip
    add("--out", metavar="FILE", type=Path, help="store all figures as JSON")
    add("--json", action="store_true", help="print one JSON object")
    add_config_arguments(parser)


def run(args: Namespace) -> int:
    config = load_config(args)
    if args.out:
        check_writable(args.out)
    from lineshaft_conformance.ahead import compile_ahead

    found = compile_ahead(config, args.topology, args.programs, Told())
    report = json.dumps({"model": config.model, **found.to_json()}, indent=2)
    if args.out:
        args.out.write_text(f"{report}\n", encoding="utf-8")
    print(report if args.json else as_text(found))
    found.require_fit()
    return 0


class Told:
    """Tells on stderr of each program that is done, and about how long the others take."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, done: int, total: int, program: CompiledProgram) -> None:
        left = (time.monotonic() - self._began) / done * (total - done)
        remains = f", about {left:.0f} s remain" if FEW <= done < total else ""
        print(f"{done} of {total}: {program.label} in {program.report.seconds:.1f} s{remains}", file=sys.stderr)


def as_text(found: Compiled) -> str:
    rows = [row(program, found.uncounted) for program in found.programs]
    return "\n".join([table(HEADER, rows), "", *summary(found)])


def row(program: CompiledProgram, uncounted: Collection[str] = ()) -> tuple[str, ...]:
    """A program's line, with "-" for the figures that nobody counts."""
    shape, report = program.shape, program.report
    counts = (shape.tokens, shape.rows, "x".join(map(str, shape.pages)) or "-", shape.logits)
    said = {"flops": amount}
    names = ("arguments", "outputs", "temporaries", "aliased", "flops", "moved")
    sizes = ["-" if name in uncounted else said.get(name, human)(getattr(report, name)) for name in names]
    cached = "yes" if report.cached else "no"
    return (program.label, *map(str, counts), *sizes, f"{report.seconds:.1f}", cached)


def summary(found: Compiled) -> list[str]:
    """What a device has, what is put on it, whether that fits, and what the run is."""
    sizes = found.sizes
    held = ", ".join(
        f"{pages} pages of {size} tokens" for pages, size in zip(sizes.pages, sizes.page_sizes, strict=True)
    )
    memory = "memory not counted" if found.total is None or found.free is None else f"{human(found.total)} of memory"
    counted = f" ({human(found.free)} free)" if found.free is not None else ""
    lines = [
        f"a device of {found.topology}: {memory}{counted}",
        f"weights {human(sizes.plan.weight_bytes)}, KV pool {human(found.pool)} ({held or 'none'})",
        at_work(found),
        verdict(found),
    ]
    seconds, cached = (sum(p.report.seconds for p in found.programs), sum(p.report.cached for p in found.programs))
    layout = ", ".join(f"{axis}={degree}" for axis, degree in found.layout.items() if degree > 1) or "one device"
    declared = f"; declared, not compiled: {', '.join(found.declared)}" if found.declared else ""
    return [
        *lines,
        f"plan {found.plan.hash[:16]}  backend {found.plan.backend}  {found.dtype}  {layout}  "
        f"{len(found.programs)} of {found.listed} programs in {seconds:.1f} s, {cached} of them from a cache; "
        f"evidence: compiled-only{declared}",
    ]


def at_work(found: Compiled) -> str:
    """What is needed beside weights and pool."""
    if not found.counts_memory:
        return (
            f"one step's results {human(found.sizes.plan.workspace_bytes)} by the plan; temporaries and code are not "
            "counted by this backend's compiler"
        )
    largest = found.largest
    return (
        f"largest program {largest.label}: {human(largest.beyond(found.resident))} beside them, of that temporaries "
        f"{human(largest.report.temporaries)}; code of all programs {human(found.code)}"
    )


def verdict(found: Compiled) -> str:
    """Whether it fits, and how many KV pages could be had."""
    if found.spare is None:
        return (
            f"needs at least {human(sum(found.parts.values()))} of a device; whether that is there is not said: the "
            "backend does not know the memory of this target"
        )
    fits = (
        f"fits: {human(found.spare)} stay free" if found.spare >= 0 else f"does NOT fit: {human(-found.spare)} too much"
    )
    part = "" if len(found.programs) == found.listed else ", judged by the programs compiled alone"
    room = "" if found.room is None else f"; room for {found.room} KV pages in all ({found.tokens(found.room)} tokens)"
    return f"{fits}{room}{part}"
