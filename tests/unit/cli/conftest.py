"""What the tests of commands share: running one, and an LLM that is a stand-in."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.cli.fakes import FakeLLM

from lineshaft.cli.main import main

Ran = tuple[int, str, str]
"""Exit status, stdout and stderr."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    module = types.ModuleType("lineshaft.llm")
    FakeLLM.seen = {}
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lineshaft.llm", module)
    return FakeLLM.seen


@pytest.fixture
def lineshaft_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command line in this process."""

    def run(*arguments: str) -> Ran:
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run
