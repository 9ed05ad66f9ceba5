"""`lineshaft conformance`: runs the suite on a backend, lists its checks, and handles what a run leaves behind.

This module only parses, so that `lineshaft --help` stays quick; EPILOG explains the exit statuses.
"""

from __future__ import annotations

import argparse
import contextlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from lineshaft.errors import LineshaftError

LONGEST = 1e6
"""Seconds or minutes that a user may ask for."""
HELP = "check what a backend claims, and certify what it passes"
EPILOG = """exit status:
  0    all passed up to the level asked for
  1    a check failed, a level has not a single pass, or two bundles differ
  2    the command line, a key file or a configuration is wrong
  3    unknown backend
  4    unknown check
  5    the backend is not usable here, or does not load
  6    the waiver file is wrong, or a waiver is expired
  7    the bundle is corrupt or does not verify, or checks tried again do not hold
  8    the bundle is consistent, but its signer unknown (no --key)
  9    a mutant survived
  130  interrupted
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="act", required=True, metavar="COMMAND")

    def command(name: str, text: str, *groups: Callable[[ArgumentParser], None]) -> ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        for group in groups:
            group(made)
        return made

    run = command("run", "run the suite on a backend", backend_arguments, case_arguments, run_arguments)
    run.add_argument("--json", action="store_true", help="print the report as JSON on stdout instead of a table")
    run.add_argument("--waivers", metavar="FILE", type=Path, help="TOML file of known failures")
    run.add_argument("--out", metavar="DIR", type=Path, help="write the bundle: JSON, JUnit XML, HTML, signature")
    run.add_argument("--key", metavar="FILE", type=Path, help="private key to sign the bundle with")
    command("list", "list the ids of the checks, each with its rule", backend_arguments, case_arguments)
    verify = command("verify", "check a bundle's signature and completeness", jobs_argument)
    verify.add_argument("bundle", metavar="BUNDLE", type=Path)
    verify.add_argument("--key", metavar="PUB", type=Path, help="public key of the signer")
    verify.add_argument(
        "--rerun",
        metavar="N",
        type=whole,
        help="try N of its checks again (default 5 where the backend is here; 0: none)",
    )
    diff = command("diff", "compare two bundles")
    diff.add_argument("a", metavar="A", type=Path)
    diff.add_argument("b", metavar="B", type=Path)
    diff.add_argument("--all", action="store_true", help="list what differs only in kernels and evidence, too")
    diff.add_argument("--json", action="store_true", help="print all differences as JSON on stdout")
    keygen = command("keygen", "make a key pair: FILE (mode 600) and FILE.pub")
    keygen.add_argument("file", metavar="FILE", type=Path)
    mutants = command("mutants", "run the suite on backends that are broken on purpose", jobs_argument)
    mutants.add_argument("names", metavar="NAME", nargs="*", help="only these mutants, by name or shell pattern")
    mutants.add_argument("--list", action="store_true", help="name every mutant and its rule, and run none")
    mutants.add_argument("--thorough", action="store_true", help="each must also pass everything below its level")
    soak = command("soak", "run L1 and L2 over and over with fresh seeds", backend_arguments, jobs_argument)
    soak.add_argument("--case", metavar="ID", action="append", default=[], help="an id or shell pattern; repeatable")
    soak.add_argument("--seed", metavar="N", type=whole, default=0, help="the fresh seeds follow from it (default 0)")
    soak.add_argument("--minutes", metavar="M", type=duration, default=20.0, help="how long (default 20)")
    soak.add_argument("--least", metavar="N", type=whole, default=50, help="seeds to try at least (default 50)")
    soak.add_argument("--repeat", metavar="N", type=positive, help="instead: the whole smoke set, N times, one seed")


def backend_arguments(parser: ArgumentParser, *, required: bool = True) -> None:
    text = "a backend that `lineshaft backends` lists"
    further = "" if required else " (default: all that compile ahead of time)"
    parser.add_argument("--backend", metavar="NAME", required=required, help=f"{text}{further}")
    parser.add_argument("--backend-option", metavar="KEY=VALUE", action="append", default=[], help="repeatable")


def case_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--level", metavar="L", type=level, default=5, help="highest level to run, L0 to L5 (default)")
    parser.add_argument("--size", metavar="SIZE", default="smoke", help='smoke (default), full or "fuzz N"')
    parser.add_argument("--case", metavar="ID", action="append", default=[], help="an id or shell pattern; repeatable")


def run_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", type=whole, default=0, help="seed of all values (default 0)")
    parser.add_argument("--limit", metavar="S", type=limit, help="seconds for each check in place of its own limit")
    jobs_argument(parser)


def jobs_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--jobs", metavar="N", type=positive, help="processes at a time (default: half of the CPUs)")


def level(text: str) -> int:
    """A level as users write it: L3 or 3."""
    digits = text.upper().removeprefix("L")
    if digits not in tuple("012345"):
        raise argparse.ArgumentTypeError(f"{text!r} is no level; allowed are L0, L1, L2, L3, L4 and L5")
    return int(digits)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def positive(text: str) -> int:
    if not whole(text):
        raise argparse.ArgumentTypeError("allowed is a whole number of at least 1")
    return int(text)


def duration(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= LONGEST:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: allowed is a number from 0 to {LONGEST:g}")


def limit(text: str) -> float:
    if not duration(text):
        raise argparse.ArgumentTypeError("allowed is a number above 0")
    return float(text)


def run(args: Namespace) -> int:
    """Run the command; the errors that it raises carry their exit status."""
    from lineshaft_conformance.cli.acts import ACTS, status_of

    try:
        return ACTS[args.act](args)
    except LineshaftError as error:
        error.status = status_of(error)
        raise
