"""`lineshaft buckets`: the table of static lengths that pads least. Only parses and prints."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lineshaft_bench.cli.simulate import whole

if TYPE_CHECKING:
    from lineshaft_bench.padding import Choice, Lengths

HELP = "pick the table of prefill buckets that pads least, for given lengths of prompts"


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--lengths", metavar="LENGTHS", required=True,
        help="uniform:low=1,high=2048 or lognormal:median=512,sigma=1,high=8192; a file with one length a line; or a "
        "trace as `lineshaft simulate` takes it, for its prompts",
    )  # fmt: skip
    add("--buckets", metavar="N", type=whole, required=True, help="how many")
    add("--multiple-of", metavar="M", type=whole, default=1, help="only multiples of M (default: 1)")
    add("--seed", metavar="N", type=int, default=0, help="of a generated trace (default: 0)")
    add("--skip-bad", action="store_true", help="leave out bad lines of a file, and count them")
    add("--json", action="store_true", help="print JSON instead of lines of a configuration")


def run(args: Namespace) -> int:
    from lineshaft_bench.padding import choose, read_lengths

    lengths = read_lengths(args.lengths, seed=args.seed, skip_bad=args.skip_bad)
    choice = choose(lengths, args.buckets, args.multiple_of)
    print(as_json(lengths, choice) if args.json else "\n".join(lines(lengths, choice)))
    return 0


def lines(lengths: Lengths, choice: Choice) -> Iterator[str]:
    """Lines for a configuration file, with what they save as comments."""
    powers = ", ".join(map(str, choice.powers))
    yield f"# {lengths.name}: {len(lengths.weights)} tokens at most, {lengths.mean:.1f} on average"
    if lengths.skipped:
        yield f"# {lengths.skipped} bad lines were left out"
    yield f"# padding: {choice.share:.1%} of tokens; powers of two ({powers}) {choice.powers_share:.1%}"
    yield f"# ratio to powers of two: {choice.ratio:.3f}"
    yield "[backend_options]"
    yield f"prefill_buckets = {list(choice.table)}"
    yield "[scheduler]"
    yield f"token_budget = {choice.table[-1]}  # less would cut the table"


def as_json(lengths: Lengths, choice: Choice) -> str:
    found = {
        "lengths": lengths.name, "longest": len(lengths.weights), "mean": lengths.mean,
        "skipped_lines": lengths.skipped, "prefill_buckets": choice.table, "padding_share": choice.share,
        "powers_of_two": choice.powers, "powers_of_two_share": choice.powers_share, "ratio": choice.ratio,
    }  # fmt: skip
    return json.dumps(found, indent=2)
