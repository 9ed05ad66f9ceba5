"""`lineshaft backends`: which backends are registered, usable or rejected, and why."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lineshaft.registry import BackendStatus, Registry, Rejected

HELP = "list the backends, whether they can be used here, and why not"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    from lineshaft.registry import discover

    registry = discover()
    print(json.dumps(as_json(registry), indent=2) if args.json else as_table(registry))
    return 0


def as_json(registry: Registry) -> dict[str, Any]:
    """Both lists, with kinds by name."""
    return {
        "backends": [asdict(status) | {"kind": status.kind.name.lower()} for status in registry.status()],
        "rejected": [asdict(rejected) for rejected in registry.rejected],
    }


def as_table(registry: Registry) -> str:
    from lineshaft.cli.table import table

    rows = [*map(status_row, registry.status()), *map(rejected_row, registry.rejected)]
    return table(("BACKEND", "KIND", "STATE", "FROM", "DEVICES", "REASON"), rows)


def status_row(status: BackendStatus) -> tuple[str, ...]:
    state = "usable" if status.usable else "not usable"
    origin = f"{status.distribution} {status.version}".strip()
    return status.name, status.kind.name.lower(), state, origin, ", ".join(status.devices) or "-", status.reason


def rejected_row(rejected: Rejected) -> tuple[str, ...]:
    return rejected.plugin, "-", "rejected", rejected.distribution, "-", rejected.reason
