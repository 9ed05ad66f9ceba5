"""The entry point of the command line: picks the command and turns every failure into one line and an exit status.

It imports nothing heavy: what a command needs, it imports when it runs.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lineshaft.cli import backends, chat, completion, config, explain, generate
from lineshaft.cli.plugins import Command, further_commands
from lineshaft.errors import LineshaftError

COMMANDS: Mapping[str, Command] = {
    "generate": generate,
    "chat": chat,
    "backends": backends,
    "explain": explain,
    "config": config,
    "completion": completion,
}
"""Core's own commands; another distribution cannot replace them."""
FAILED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others. It and those of its commands take -v."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text = "log, and show tracebacks of errors"
        self.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=text)

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"lineshaft: error: {message}; see `{self.prog} --help`\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Of --option=--, the text "--": Python before 3.13 drops it and gives an empty list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)


class Version(argparse.Action):
    """Prints the installed version; looks it up only when asked."""

    def __call__(self, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"lineshaft {version('lineshaft')}")
        raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 after an error (or the status that the error carries, see `LineshaftError`), 130
    when interrupted, 141 when the reader of stdout went away; a command may return statuses of its own."""
    commands = all_commands()
    args = parser(commands).parse_args(arguments)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="lineshaft: %(message)s")
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        status: int = commands[args.command].run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED, verbose=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return PIPE_CLOSED
    except LineshaftError as error:
        return fail(f"error: {type(error).__name__}: {error}", error.status, verbose=args.verbose)
    except OSError as error:
        return fail(f"error: {type(error).__name__}: {error}; check that file or device", FAILED, verbose=args.verbose)
    except MemoryError as error:
        said = f" ({error})" if str(error) else ""
        line = f"error: OutOfMemory: the host has no memory left{said}; choose a smaller model, dtype or cache.pages"
        return fail(line, FAILED, verbose=args.verbose)


def all_commands() -> Mapping[str, Command]:
    """Core's own, in their order, and those of other distributions."""
    return {**COMMANDS, **further_commands(), **COMMANDS}


def stop(number: int, frame: object) -> NoReturn:
    """On a signal to end: leave through every `finally`, so that workers and temporary files go too."""
    raise SystemExit(128 + number)


def parser(commands: Mapping[str, Command]) -> Parser:
    """The parser of all commands."""
    top = Parser(prog="lineshaft", description="One inference engine for any accelerator.")
    top.set_defaults(verbose=False)
    top.add_argument("--version", action=Version, nargs=0, help="print the version")
    choices = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands.items():
        command = choices.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
    return top


def fail(line: str, status: int, *, verbose: bool) -> int:
    """Print the one line, after the traceback where asked for."""
    if verbose:
        traceback.print_exc()
    print(f"lineshaft: {' '.join(line.split())}", file=sys.stderr)
    return status
