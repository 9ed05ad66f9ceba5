"""Commands that other distributions add: found, listed with a reason where they cannot be had, and never in the way."""

from __future__ import annotations

import subprocess
import sys
import types
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from lineshaft.cli import main as entry
from lineshaft.cli.plugins import GROUP, Absent, further_commands
from lineshaft.errors import LineshaftError

Install = Callable[..., EntryPoint]


def add_count(parser: ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=1)


def count(args: Namespace) -> int:
    return 40 + int(args.count)


GOOD = {"HELP": "counts", "add_arguments": add_count, "run": count}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a module with these attributes in place; returns an entry point of that name."""

    def put(name: str, module: str = "", **attributes: Any) -> EntryPoint:
        made = types.ModuleType(f"fake_{module or name}")
        vars(made).update(attributes)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        return EntryPoint(name, made.__name__, GROUP)

    return put


@pytest.fixture
def lineshaft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line with exactly these further commands; returns its status, stdout and stderr."""

    def run(points: list[EntryPoint], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(entry, "further_commands", lambda: further_commands(points))
        try:
            status = entry.main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_further_command_parses_and_runs_as_cores_own(install: Install, lineshaft: Any) -> None:
    points = [install("count", **GOOD)]
    assert lineshaft(points, "count", "--count", "2") == (42, "", "")
    assert "counts" in lineshaft(points, "--help")[1]
    status, _, err = lineshaft(points, "count", "--cuont", "2")
    assert (status, err.count("\n")) == (2, 1)


def test_an_error_carries_its_exit_status(install: Install, lineshaft: Any) -> None:
    def run(args: Namespace) -> int:
        error = LineshaftError("no\nsuch thing")
        error.status = 7
        raise error

    assert lineshaft([install("fail", **{**GOOD, "run": run})], "fail") == (
        7,
        "",
        "lineshaft: error: LineshaftError: no such thing\n",
    )
    assert LineshaftError.status == 2


def test_a_command_that_cannot_be_loaded_is_listed_with_its_reason(install: Install, lineshaft: Any) -> None:
    def refuse(parser: ArgumentParser) -> None:
        raise RuntimeError("100% wrong")

    points = [
        install("refuses", **{**GOOD, "add_arguments": refuse}),
        install("empty"),
        EntryPoint("gone", "a_module_that_nobody_has", GROUP),
        install("good", **GOOD),
        install("twice", **GOOD),
        install("twice", "other", **GOOD),
    ]
    for name, reason in (
        ("refuses", "RuntimeError: 100% wrong"),
        ("empty", "add_arguments"),
        ("gone", "a_module_that_nobody_has"),
        ("twice", "two distributions bring it"),
    ):
        status, _, err = lineshaft(points, name, "--any", "thing")
        assert (status, err.count("\n")) == (2, 1)
        assert f"the command {name!r} is not available" in err
        assert reason in err
    assert lineshaft(points, "good")[0] == 41
    status, out, _ = lineshaft(points, "--help")
    assert (status, "100% wrong" in " ".join(out.split())) == (0, True)


def test_core_keeps_its_own_commands(install: Install, lineshaft: Any) -> None:
    status, out, _ = lineshaft([install("backends", **GOOD)], "backends")
    assert (status, "numpy" in out) == (0, True)


@pytest.mark.parametrize("name", ["compile", "conformance", "kernels", "new-plugin", "trace"])
def test_a_command_that_is_not_installed_says_what_to_install(lineshaft: Any, name: str) -> None:
    status, _, err = lineshaft([], name, "run", "--backend", "x")
    assert status == 2
    assert f"the command {name!r} is not available: install the distribution lineshaft-conformance" in err
    assert isinstance(further_commands([])[name], Absent)


def test_the_help_of_installed_commands_imports_nothing_heavy() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from lineshaft.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'numpy', 'pydantic', 'torch', 'pluggy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "conformance" in done.stdout
