"""The gallery of mutants: the suite's own checks kill each of them, and kill nothing that is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("lineshaft_cpu")

from lineshaft_conformance.checks import Check, Failure, Found
from lineshaft_conformance.levels import collect
from lineshaft_conformance.mutants import attention, gallery, kill, ops, schemes, whole
from lineshaft_conformance.mutants.kill import TARGET, Kill, Suite, kill_all, kill_table
from lineshaft_conformance.mutants.mutant import Mutant, changed, with_call
from lineshaft_conformance.mutants.plain import attend_with
from lineshaft_conformance.subject import Subject

LANDED = (0, 1, 2)
"""Levels whose checks this file runs, on mutants that a smoke check kills: the others take too long here, and
`lineshaft conformance mutants` has them all."""
OWN = [m for file in (attention, schemes, ops, whole) for m in file.MUTANTS if m.level in LANDED]
QUICK = [m for m in OWN if not m.fatal and m.size == "smoke" and m.name != "probe-slow"]
RAISE = {"add-raises-in-replay", "boasting-features", "tie", "supports-raises", "does-not-compile", "ahead-unmade"}
"""Mutants whose very fault is that something raises; all others return what is wrong."""


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite(Subject(TARGET))


def verdict(found: Found) -> tuple[str, str]:
    by, reason = json.loads(found.notes[0])
    return by, reason


def as_named(monkeypatch: pytest.MonkeyPatch, made: Mutant) -> Mutant:
    """A mutant that the gallery does not hold, put there for one test."""
    extended: Mapping[str, Mutant] = {**gallery(), made.name: made}
    monkeypatch.setattr("lineshaft_conformance.mutants.gallery", lambda: extended)
    return made


@pytest.mark.parametrize("broken", QUICK, ids=lambda m: m.name)
def test_a_mutant_is_killed_by_a_check_that_the_backend_passes(suite: Suite, broken: Mutant) -> None:
    by, reason = verdict(suite.kill(broken, 0))
    assert by, reason
    assert reason.startswith("raised ") == (broken.name in RAISE), f"not killed by what it returns: {reason}"


def test_a_mutant_that_ends_or_crashes_its_process_is_killed_and_the_run_goes_on() -> None:
    names = ["add-exits", "add-crashes", "add-subtracts"]
    kills = kill_all(names, jobs=2)
    assert {k.name for k in kills} == set(names)
    assert not [k for k in kills if not k.killed]


def test_names_and_rules_are_told_and_levels_fit_their_checks() -> None:
    found = gallery()  # asserts that no two share a name
    assert len(found) >= 40
    assert not [m.name for m in found.values() if not m.rule.strip()]
    assert not [m.name for m in found.values() if not m.checks.startswith(f"L{m.level}/")]


def test_every_pattern_matches_checks_of_the_backend_itself(suite: Suite) -> None:
    def matches(broken: Mutant) -> bool:
        return bool(suite.matching(broken, suite.subject))

    assert not [m.name for m in QUICK if not matches(m)]


def test_a_plain_attention_and_a_wrapped_kernel_survive(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    right: dict[str, Callable[[Any], Any]] = {
        "L2/attend/mixed/*-f32": attend_with(),
        "L1/linear/decode/*": with_call("linear", lambda problem, run, *args, **kwargs: run(*args, **kwargs)),
        "L2/rope_write_kv/mixed/*": ops.fused(ops.turned_and_written),
        "L0/load/*": changed,
    }
    for checks, make in right.items():
        made = as_named(monkeypatch, Mutant("right", "none", int(checks[1]), checks, make))
        by, reason = verdict(suite.kill(made, 0))
        assert not by and reason.startswith("it survives") and " 0 checks" not in reason, reason


def test_the_kernels_for_quantized_caches_are_right_until_they_are_broken(suite: Suite, monkeypatch: Any) -> None:
    as_named(monkeypatch, Mutant("schemes", "none", 2, "L2/*", schemes.kernels()))
    subject = Subject(replace(TARGET, mutant="schemes"))
    checks = [c for c in suite.checks("smoke", 2, suite.subject) if fnmatchcase(c.id, "L2/*/kv_*-f32")]
    ran = {name for check in checks for name in check.run(subject, 0).kernels}
    assert ran == {"scheme_attend", "scheme_write_kv"}


def test_a_check_that_the_backend_fails_itself_kills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(subject: Subject, seed: int) -> Found:
        raise Failure("no backend passes this")

    monkeypatch.setattr(kill, "collect_checks", lambda subject, size, level: [Check("L1/add/never", never)])
    by, reason = verdict(Suite(Subject(TARGET)).kill(gallery()["add-subtracts"], 0))
    assert not by
    assert "fails the backend itself: no backend passes this" in reason


def test_a_thorough_run_tells_of_a_mutant_that_a_lower_level_fails(suite: Suite, monkeypatch: Any) -> None:
    make = gallery()["unknown-op"].make
    made = as_named(monkeypatch, Mutant("misnamed", "a kernel's op exists", 1, "L1/add/*", make))
    by, reason = verdict(suite.kill(made, 0, thorough=True))
    assert not by
    assert reason.startswith("named level 1, but L0/load/kernels fails it")


def test_a_mutant_leaves_nothing_behind(suite: Suite) -> None:
    check = next(c for c in collect(suite.subject, "smoke", 1) if c.id.startswith("L1/add/t1"))
    for _ in range(2):
        assert verdict(suite.kill(gallery()["add-subtracts"], 0))[0] == check.id
        assert check.run(suite.subject, 0).kernels


def test_the_table_shows_survivors() -> None:
    dead = Kill("a", "rule a", 1, "L1/add/x", "off [/pair.cc:553]", 0.1)
    kills = [dead, Kill("b", "rule b", 2, "", "it survives 3 checks", 0.2)]
    console = Console(width=160)
    with console.capture() as captured:
        console.print(kill_table(kills))
    text = captured.get()
    assert "1 of 2 mutants killed" in text and "SURVIVED" in text and "L1/add/x" in text
    assert "off [/pair.cc:553]" in text  # no markup
