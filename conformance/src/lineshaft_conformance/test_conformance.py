"""The suite as pytest items, one a check, in this process: its id, a marker of its level, and its outcome.

In a repository of a backend's author, a test file of one line runs it too:
`from lineshaft_conformance.test_conformance import *`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from lineshaft.cli.options import pairs
from lineshaft.errors import ConfigError
from lineshaft_conformance.checks import Check, Failure
from lineshaft_conformance.levels import collect
from lineshaft_conformance.pytest_plugin import check_backend
from lineshaft_conformance.results import Result, Status
from lineshaft_conformance.runner.attempt import attempt
from lineshaft_conformance.subject import Subject, Target
from lineshaft_conformance.waivers import WaiverError, Waivers, load_waivers

__all__ = ["pytest_generate_tests", "test_check"]
RUN = pytest.StashKey["Run"]()


class Run:
    """What all items of one process share: the started backend, the checks and the waivers."""

    def __init__(self, config: pytest.Config) -> None:
        self.seed: int = config.getoption("--conformance-seed")
        self.waivers = waivers_of(config)
        options = dict(pairs("--backend-option", config.getoption("--backend-option")))
        self.subject = Subject(Target(config.getoption("--backend"), options))
        level = int(config.getoption("--conformance-level")[1])
        self.checks = tuple(collect(self.subject, config.getoption("--conformance-size"), level))
        config.add_cleanup(self.subject.close)

    def result(self, check: Check) -> tuple[Result, BaseException | None]:
        """The check's result as the waivers leave it."""
        result, error = attempt(check, self.subject, self.seed)
        return self.waivers.apply([result], datetime.now(UTC).date(), covered=())[0], error


def waivers_of(config: pytest.Config) -> Waivers:
    file = config.getoption("--waivers")
    return load_waivers(Path(file)) if file else Waivers()


def run_of(config: pytest.Config) -> Run:
    """The one Run of this process. Raises UsageError where the user is to act."""
    if RUN not in config.stash:
        if not hasattr(config.option, "conformance_level"):
            check_backend(None, ())
        try:
            config.stash[RUN] = Run(config)
        except (ConfigError, WaiverError) as error:
            raise pytest.UsageError(f"{type(error).__name__}: {error}") from error
    return config.stash[RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for each check."""
    if metafunc.function is not test_check:
        return
    checks = run_of(metafunc.config).checks
    items = [pytest.param(check, id=check.id, marks=getattr(pytest.mark, f"l{check.level}")) for check in checks]
    metafunc.parametrize("check", items)


def test_check(check: Check, pytestconfig: pytest.Config) -> None:
    result, error = run_of(pytestconfig).result(check)
    if result.status is Status.NOT_CLAIMED:
        pytest.skip(result.reason)
    if result.status is Status.WAIVED:
        pytest.xfail(result.reason)
    if result.status is Status.FAIL:
        if error is not None and not isinstance(error, Failure):
            raise error
        pytest.fail(result.reason, pytrace=False)
