"""`lineshaft explain`: which kernel each op gets and why the others do not, without loading weights."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING

from lineshaft.cli.options import add_config_arguments, load_config
from lineshaft.cli.table import table

if TYPE_CHECKING:
    from lineshaft.plan import Plan
    from lineshaft.plan.plan import PlanEntry

HELP = "show the plan: the kernel of every op, and why others are declined"

FEW = 3
"""Reasons in a cell of the table."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--shapes",
        action="store_true",
        help="one row for every problem, and the list of buckets (--json has both anyway)",
    )
    add_config_arguments(parser)


def run(args: Namespace) -> int:
    config = load_config(args)
    from lineshaft.explain import explain

    plan = explain(config)
    if args.json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        print(by_problem(plan) if args.shapes else by_kernel(plan))
        print(*plan.notes, *padding(plan), sep="\n")
        print(f"plan {plan.hash}  backend {plan.backend}  buckets {len(plan.shapes)}  problems {len(plan.entries)}")
    return 0


def by_kernel(plan: Plan) -> str:
    """One row for every op, kernel and set of rejections, with the number of problems that it stands for."""
    counts = Counter((entry.op, entry.dtype, entry.label, declined(entry)) for entry in plan.entries)
    rows = [(op, dtype, kernel, str(count), reasons) for (op, dtype, kernel, reasons), count in counts.items()]
    return table(("OP", "DTYPE", "KERNEL", "PROBLEMS", "REJECTED"), rows)


def by_problem(plan: Plan) -> str:
    """One row for every problem, one for every tie that measuring settles, and one for every bucket."""
    rows = [(entry.op, entry.problem, entry.label, declined(entry)) for entry in plan.entries]
    shapes = [tuple(map(str, astuple(shape)[:5])) for shape in plan.shapes]
    problems = table(("OP", "PROBLEM", "KERNEL", "REJECTED"), rows)
    times = [(name, choice.kernel, str(choice)) for name, choice in plan.choices.items()]
    ties = f"{table(('TIE', 'KERNEL', 'A CALL TAKES'), times)}\n\n" if times else ""
    return f"{problems}\n\n{ties}{table(('TOKENS', 'ROWS', 'PAGES', 'LOGITS', 'MAX_QUERY'), shapes)}\n"


def padding(plan: Plan) -> Iterator[str]:
    """What each table of buckets pads where all sizes are as frequent."""
    from lineshaft.runner.buckets import padding_share

    prefill = sorted({shape.tokens for shape in plan.shapes if shape.max_query > 1})
    decode = sorted({shape.rows for shape in plan.shapes if shape.max_query == 1})
    for name, unit, sizes in (("prefill", "tokens", prefill), ("decode", "rows", decode)):
        if sizes:
            share, listed = padding_share(sizes, [1] * sizes[-1]), ", ".join(map(str, sizes))
            yield f"{name} buckets {listed}: {share:.1%} of {unit} are padding for sizes uniform in 1..{sizes[-1]}"


def declined(entry: PlanEntry) -> str:
    """The rejected kernels by reason: the FEW reasons that fewest share, which tell most, and how many have others."""
    kernels: dict[str, list[str]] = {}
    for rejection in entry.rejected:
        kernels.setdefault(rejection.reason, []).append(rejection.kernel)
    told = sorted(kernels.items(), key=lambda item: len(item[1]))
    more = sum(len(names) for _, names in told[FEW:])
    texts = [f"{', '.join(names)}: {reason}" for reason, names in told[:FEW]]
    return "; ".join([*texts, *([f"+{more} more, see --json"] if more else [])]) or "-"
