"""`lineshaft kernels`: lists a backend's kernels, and compiles them for every target of its toolchain.

Neither needs the device. This module only parses and prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lineshaft.cli.options import check_writable, pairs
from lineshaft.cli.table import table
from lineshaft.errors import InvalidValue
from lineshaft_conformance.cli.conformance import backend_arguments, limit, positive

if TYPE_CHECKING:
    from lineshaft_conformance.matrix import Matrix
    from lineshaft_conformance.subject import Target
    from lineshaft_contract.backends import Offered

HELP = "list a backend's kernels, or compile them for devices that are not here"
LIST_EPILOG = """exit status:
  0    done
  2    the command line or a configuration is wrong, or the backend does not load
  130  interrupted
"""
EPILOG = """exit status:
  0    done
  1    a kernel fails to compile, or is worse than in the matrix of --against: it does not compile any more, spills
       registers where it spilled none, has lost a class of matrix instructions, or takes more registers or shared
       memory, by more than a tenth and more than 8 registers or 1 KiB
  2    the command line or a configuration is wrong, the backend does not load, or nothing was compared with --against
  130  interrupted
"""
PASSED, FAILED = 0, 1
LIST = ("OP", "KERNEL", "PRIORITY", "LAYOUT", "VERSION", "HANDLES", "OPTIONS", "NOTE")
STORED = ("out", "table", "markdown")
"""Options that name a file to write."""


def add_arguments(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="act", required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str, *, required: bool = True) -> ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        backend_arguments(made, required=required)
        made.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return made

    listing = command("list", "list the kernels of a backend: what each is for, and what it handles", LIST_EPILOG)
    listing.add_argument(
        "--target", metavar="NAME", default="", help="the device to list for (default: by the options)"
    )
    text = "compile every kernel for every target, without the device"
    add = command("compile", text, EPILOG, required=False).add_argument
    add(
        "--targets",
        metavar="A,B",
        action="append",
        default=[],
        help="names or shell patterns, of any backend (default: all targets)",
    )
    add("--kernels", metavar="A,B", action="append", default=[], help="names or shell patterns (default: all kernels)")
    add(
        "--problems", choices=("first", "real", "all"), default="all",
        help="compile each kernel for the first problem that it takes, those of real models, or its op's cases too "
        "(default)",
    )  # fmt: skip
    add("--jobs", metavar="N", type=positive, help="processes at a time (default: all CPUs)")
    add("--limit", metavar="S", type=limit, help="seconds for each kernel and target (default 1800)")
    add("--out", metavar="FILE", type=Path, help="store the matrix with every problem as JSON")
    add(
        "--table",
        metavar="FILE",
        type=Path,
        help="store a line for each kernel and target as JSON, to keep and compare",
    )
    add("--markdown", metavar="FILE", type=Path, help="store the table, with reasons, as Markdown")
    add("--against", metavar="FILE", type=Path, help="fail where a kernel is worse than in this matrix or table")


def run(args: Namespace) -> int:
    return act_list(args) if args.act == "list" else act_compile(args)


def target(args: Namespace) -> Target:
    from lineshaft_conformance.subject import Target

    return Target(args.backend, dict(pairs("--backend-option", args.backend_option)))


def targets(args: Namespace) -> list[Target]:
    """The backend that is asked for, or all that compile ahead of time. Raises InvalidValue."""
    if args.backend is not None:
        return [target(args)]
    from lineshaft.registry import discover
    from lineshaft_conformance.subject import Target

    if args.backend_option:
        raise InvalidValue("--backend-option without --backend: name the backend that it is for")
    found = [Target(info.name) for info in discover().backends.values() if info.toolchain]
    if not found:
        raise InvalidValue("no installed backend compiles ahead of time; install one, such as lineshaft-cuda")
    return found


def act_list(args: Namespace) -> int:
    from lineshaft_conformance.subject import offered

    kernels = offered(target(args), args.target)
    if args.json:
        print(json.dumps([described(each) for each in kernels], indent=2))
    else:
        print(table(LIST, list(map(row, kernels))))
    return PASSED


def described(offer: Offered) -> dict[str, Any]:
    """A kernel without its functions."""
    kernel = offer.kernel
    return {
        "op": kernel.op, "name": kernel.name, "priority": kernel.priority, "layout": kernel.layout,
        "version": kernel.version, "handles": sorted(kernel.handles), "options": dict(kernel.options),
        "note": offer.note,
    }  # fmt: skip


def row(offer: Offered) -> Sequence[str]:
    kernel = offer.kernel
    options = ", ".join(f"{key}={value}" for key, value in sorted(kernel.options.items()))
    handles = ", ".join(sorted(kernel.handles))
    return (
        kernel.op, kernel.name, str(kernel.priority), kernel.layout or "-", kernel.version, handles or "-",
        options or "-", offer.note or "-",
    )  # fmt: skip


def act_compile(args: Namespace) -> int:
    from lineshaft_conformance.cli.bar import Bar
    from lineshaft_conformance.matrix import load_matrix
    from lineshaft_conformance.report.matrix import text
    from lineshaft_conformance.runner.matrix import compile_matrix

    before = load_matrix(args.against) if args.against else None
    for option in STORED:
        if file := getattr(args, option):
            check_writable(file, f"--{option}")
    devices, kernels = names(args.targets), names(args.kernels)
    with Bar() as bar:
        matrix = compile_matrix(targets(args), devices, kernels, args.problems, args.jobs, args.limit, bar)
    store(matrix, args)
    print(json.dumps(matrix.to_json(), indent=2) if args.json else text(matrix))
    worse = () if before is None else compare(matrix, before, kernels, args.against)
    return FAILED if matrix.failures or worse else PASSED


def compare(matrix: Matrix, before: Matrix, kernels: Sequence[str], file: Path) -> tuple[str, ...]:
    """Tell what is worse than before, and return it. Raises InvalidValue where nothing can be compared."""
    from lineshaft_conformance.matrix import COMPILED

    count = len(matrix.compared(before, kernels))
    if not count:
        raise InvalidValue(
            f"--against {file}: no cell could be compared; it is of {before.backend} and holds "
            f"{before.count(COMPILED)} that compiled, for {', '.join(before.targets) or 'no target'}, and this run is "
            f"of {', '.join(matrix.kernels)} for {', '.join(matrix.targets)}; give a table of these"
        )
    worse = matrix.regressions(before, kernels)
    for line in worse:
        print(f"REGRESSION {line}", file=sys.stderr)
    print(f"{count} cells compared with {file}: {len(worse)} regressions", file=sys.stderr)
    return worse


def names(texts: Sequence[str]) -> list[str]:
    """The names of A,B and A,B, each as given. Raises InvalidValue for an empty one."""
    found = [name.strip() for text in texts for name in text.split(",")]
    if not all(found):
        raise InvalidValue(f"{','.join(texts)!r} holds an empty name; names or patterns are written like A,B")
    return found


def store(matrix: Matrix, args: Namespace) -> None:
    from lineshaft_conformance.report.matrix import markdown

    if args.out:
        args.out.write_text(json.dumps(matrix.to_json(), indent=1) + "\n", encoding="utf-8")
    if args.table:
        args.table.write_text(matrix.brief(), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(matrix), encoding="utf-8")
