"""`lineshaft config show`: the value of every key, as TOML would have it, and where it comes from."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from lineshaft.cli.options import add_config_arguments, overrides
from lineshaft.cli.table import table

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
    from lineshaft.config.values import dotted

    found = settings(gather(args.config, environment(), overrides(args)))
    shown = [setting for setting in found if not args.given or setting.source != DEFAULT]
    if args.json:
        print(json.dumps({dotted(one.path): {"value": one.value, "source": one.source} for one in shown}, indent=2))
    else:
        rows = [(dotted(one.path), "-" if one.value is None else json.dumps(one.value), one.source) for one in shown]
        print(table(("KEY", "VALUE", "SOURCE"), rows))
    return 0
