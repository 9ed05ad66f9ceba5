"""`lineshaft completion`: the script with which a shell completes the commands and options that are installed."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

HELP = "print a script that makes a shell complete commands and options"
SHELLS = ("bash", "zsh", "fish")
EPILOG = """put it where the shell looks for such scripts:
  lineshaft completion bash > ~/.local/share/bash-completion/completions/lineshaft
  lineshaft completion zsh > ~/.zfunc/_lineshaft        (a folder of fpath)
  lineshaft completion fish > ~/.config/fish/completions/lineshaft.fish
"""
FILES = frozenset({"FILE", "DIR", "FOLDER", "BUNDLE", "FILE|TEXT"})
"""What stands for a path in the usage of a command."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EPILOG, RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="the shell")


def run(args: Namespace) -> int:
    import shtab

    from lineshaft.cli.main import all_commands, parser

    top = parser(all_commands())
    for action in actions(top):
        if action.type is Path or action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, shell=args.shell))
    return 0


def actions(parser: ArgumentParser) -> Iterator[Action]:
    """The options and arguments of a command and of its own commands."""
    for action in parser._actions:
        yield action
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from actions(inner)
