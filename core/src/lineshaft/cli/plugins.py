"""Finds the commands that other distributions add, by the entry-point group `lineshaft.commands`.

Such a command is a module with HELP, add_arguments and run, as core's own are. One that cannot be had stays in the
list with the reason, and touches no other command.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn, Protocol

from lineshaft.errors import PluginError

GROUP = "lineshaft.commands"
ELSEWHERE = {
    **dict.fromkeys(("compile", "conformance", "kernels", "new-plugin", "trace"), "lineshaft-conformance"),
    **dict.fromkeys(("bench", "buckets", "simulate"), "lineshaft-bench"),
}
"""Commands of this project's other distributions, which may not be installed."""


class Command(Protocol):
    """What a command's module offers."""

    HELP: str

    def add_arguments(self, parser: ArgumentParser) -> None: ...

    def run(self, args: Namespace) -> int: ...


class Absent:
    """A command that says why it cannot be had."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        self.HELP = f"not available: {reason}".replace("%", "%%")

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.prefix_chars = "\0"  # its options are unknown: take every argument as it is
        parser.add_argument("arguments", nargs="*")

    def run(self, args: Namespace) -> NoReturn:
        raise PluginError(f"the command {self.name!r} is not available: {self.reason}")


def further_commands(points: Iterable[EntryPoint] | None = None) -> Mapping[str, Command]:
    """The commands of all installed distributions, or of exactly these entry points, in the order of names."""
    found: dict[str, Command] = {}
    for point in entry_points(group=GROUP) if points is None else points:
        twice = Absent(point.name, f"two distributions bring it, one of them as {point.value!r}; uninstall one")
        found[point.name] = twice if point.name in found else load(point)
    for name, distribution in ELSEWHERE.items():
        found.setdefault(name, Absent(name, f"install the distribution {distribution}"))
    return dict(sorted(found.items()))


def load(point: EntryPoint) -> Command:
    """The command's module, or an Absent one that tells what its import did."""
    try:
        module: Any = point.load()
        module.add_arguments(ArgumentParser(description=module.HELP))
        return module if callable(module.run) else Absent(point.name, f"`run` of {point.value!r} cannot be called")
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        return Absent(point.name, f"{point.value!r} cannot be loaded: {type(error).__name__}: {said}")
