"""`lineshaft backends`: which backends are registered, usable or rejected, and why."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from lineshaft.cli.table import table

if TYPE_CHECKING:
    from lineshaft.registry import BackendStatus, Rejected

HELP = "list the backends, whether they can be used here, and why not"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    from lineshaft.registry import discover

    registry = discover()
    found = registry.status()
    if args.json:
        backends = [asdict(status) | {"kind": status.kind.name.lower()} for status in found]
        rejected = [asdict(plugin) for plugin in registry.rejected]
        print(json.dumps({"backends": backends, "rejected": rejected}, indent=2))
    else:
        rows = [*map(status_row, found), *map(rejected_row, registry.rejected)]
        print(table(("BACKEND", "KIND", "STATE", "FROM", "DEVICES", "REASON"), rows))
    return 0


def status_row(status: BackendStatus) -> tuple[str, ...]:
    state = "usable" if status.usable else "not usable"
    origin = f"{status.distribution} {status.version}".strip()
    return status.name, status.kind.name.lower(), state, origin, ", ".join(status.devices) or "-", status.reason


def rejected_row(rejected: Rejected) -> tuple[str, ...]:
    return rejected.plugin, "-", "rejected", rejected.distribution, "-", rejected.reason
