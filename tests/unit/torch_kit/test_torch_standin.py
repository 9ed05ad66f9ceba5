"""A backend on the fake device passes checks of the conformance suite: ops, paged attention, and all of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from lineshaft_conformance.checks import Check, NotClaimed
from lineshaft_conformance.levels import collect
from lineshaft_conformance.subject import Subject, Target

FEW = ("L1/linear/*", "L1/add_rms_norm/*", "L2/attend/decode/*", "L2/write_kv/mixed/*")


@pytest.fixture
def standin(install: Callable[[Path], None]) -> Iterator[Callable[..., Subject]]:
    install(Path(__file__).parent / "standin")
    made: list[Subject] = []

    def start(**options: object) -> Subject:
        made.append(Subject(Target("standin", options)))
        return made[-1]

    yield start
    for subject in made:
        subject.close()


def passed(check: Check, subject: Subject) -> bool:
    """False where the backend declines with a reason; a failure is raised."""
    try:
        check.run(subject, 0)
    except NotClaimed as declined:
        assert str(declined), check.id
        return False
    return True


@pytest.mark.parametrize("pattern", FEW)
def test_graphs_compute_what_the_ops_say(standin: Callable[..., Subject], pattern: str) -> None:
    subject = standin(lazy="main")
    found = [c for c in collect(subject, "smoke", 2) if fnmatchcase(c.id, pattern) and c.dtype in ("", "float32")]
    assert sum(passed(check, subject) for check in found[:6]) >= min(4, len(found)) > 0


@pytest.mark.parametrize("options", [{"program": "graph"}, {"program": "piecewise", "overlap": True}])
def test_sessions_and_programs_keep_their_promises(standin: Callable[..., Subject], options: dict[str, object]) -> None:
    subject = standin(**options)
    timed = ("late_compilation", "cache_copies", "unread")  # compare times, which this device has none of
    found = [c for c in collect(subject, "smoke", 3) if c.id.startswith("L3/graph/") and not c.id.endswith(timed)]
    assert sum(passed(check, subject) for check in found) >= 15
