"""The options, markers and assertion rewriting of `pytest --pyargs lineshaft_conformance --backend NAME`.

It is loaded wherever this distribution is installed, so it adds nothing unless the command line (or `addopts`) names
the suite or a backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

PACKAGE = "lineshaft_conformance"
LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--backend": {"metavar": "NAME", "help": "the backend to check, as `lineshaft backends` lists it"},
    "--backend-option": {"metavar": "KEY=VALUE", "action": "append", "default": [], "help": "repeatable"},
    "--conformance-size": {"choices": ("smoke", "full"), "default": "smoke", "help": "which checks (default smoke)"},
    "--conformance-level": {"choices": LEVELS, "default": "L5", "help": "highest level to collect (default L5)"},
    "--conformance-seed": {"metavar": "N", "type": int, "default": 0, "help": "seed of all values (default 0)"},
    "--waivers": {"metavar": "FILE", "help": "TOML file of known failures"},
}

for part in ("levels", "harness"):
    pytest.register_assert_rewrite(f"{PACKAGE}.{part}")


@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(args: Sequence[str], parser: pytest.Parser) -> None:
    """Add the options, after those of every conftest. Where another plugin owns `--backend`, that one keeps it."""
    suite = any(argument.startswith((PACKAGE, "--conformance-")) for argument in args)
    if not suite and not any(argument.partition("=")[0] in OPTIONS for argument in args):
        return
    group = parser.getgroup("lineshaft-conformance", "conformance of a lineshaft backend")
    try:
        for name, settings in OPTIONS.items():
            group.addoption(name, **settings)
    except ValueError:
        if suite:
            raise


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and see that there is such a backend, if the options are there."""
    if not hasattr(config.option, "conformance_level"):
        return
    for level in LEVELS:
        config.addinivalue_line("markers", f"{level.lower()}: checks of level {level} of a lineshaft backend")
    if not config.option.help:
        check_backend(config.option.backend, config.option.backend_option)


def check_backend(name: str | None, options: Sequence[str]) -> None:
    """Raises UsageError."""
    from lineshaft.cli.options import pairs
    from lineshaft.errors import LineshaftError
    from lineshaft.registry import discover

    registry = discover()
    if name is None:
        raise pytest.UsageError(f"which backend? give --backend NAME; registered: {', '.join(registry.backends)}")
    try:
        registry.select(name, dict(pairs("--backend-option", options)))
    except LineshaftError as error:
        raise pytest.UsageError(f"{type(error).__name__}: {error}") from error
