"""`lineshaft config show`: the value of every key and where it comes from."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from lineshaft.cli.options import add_config_arguments, overrides

if TYPE_CHECKING:
    from lineshaft.config.load import Setting

HELP = "show the configuration that a run would have, and where each value comes from"


def add_arguments(parser: ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="act", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help=HELP, description=HELP, allow_abbrev=False)
    show.add_argument("--json", action="store_true", help="print one JSON object: for each key its value and source")
    show.add_argument("--given", action="store_true", help="leave out the keys that have their defaults")
    add_config_arguments(show)


def run(args: Namespace) -> int:
    from lineshaft.config import environment
    from lineshaft.config.load import DEFAULT, gather, settings

    found = settings(gather(args.config, environment(), overrides(args)))
    shown = [setting for setting in found if not args.given or setting.source != DEFAULT]
    print(as_json(shown) if args.json else as_table(shown))
    return 0


def as_json(found: list[Setting]) -> str:
    return json.dumps({setting.key: {"value": setting.value, "source": setting.source} for setting in found}, indent=2)


def as_table(found: list[Setting]) -> str:
    """One row for each key; values are written as in TOML, "-" where there is none."""
    from lineshaft.cli.table import table

    rows = [(one.key, "-" if one.value is None else json.dumps(one.value), one.source) for one in found]
    return table(("KEY", "VALUE", "SOURCE"), rows)
