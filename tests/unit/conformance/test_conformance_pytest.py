"""The suite under pytest: items, markers, outcomes, usage errors, xdist; and nothing for those who do not ask."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ITEMS = "add/t1-w33-f32 or silu_mul"
WAIVER = """
[[waiver]]
case = "L1/add/*"
issue = "https://example.org/issues/1"
until = 2999-01-01
reason = "not written yet"
"""


def pytest(folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs pytest in that folder; returns its exit status and output."""
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-ra", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    return done.returncode, done.stdout + done.stderr


SUITE = ("--pyargs", "lineshaft_conformance", "--backend", "toy", "--conformance-level", "L2")


def test_an_item_is_a_check_with_a_marker_of_its_level(toy: Path) -> None:
    status, out = pytest(toy, *SUITE, "-m", "l1", "-k", ITEMS, "-v")
    assert (status, "test_check[L1/add/t1-w33-f32] PASSED" in out) == (0, True), out
    listed = {level: pytest(toy, *SUITE, "--collect-only", "-q", "-m", f"l{level}")[1] for level in (1, 2)}
    for level, other in ((1, 2), (2, 1)):
        assert f"[L{level}/" in listed[level]
        assert f"[L{other}/" not in listed[level]


def test_outcomes_are_those_of_the_suite(toy: Path) -> None:
    (toy / "waivers.toml").write_text(WAIVER)
    raises = ("--backend-option", "does=kernel raises", "-k", "L1/add/t1-w33-f32")
    status, out = pytest(toy, *SUITE, *raises)
    assert status == 1
    assert "RuntimeError: two" in out
    assert "toy.py:" in out
    status, out = pytest(toy, *SUITE, *raises, "--waivers", "waivers.toml")
    assert (status, "XFAIL" in out, "not written yet" in out) == (0, True, True), out
    status, out = pytest(toy, *SUITE, "-k", "L1/add/t1-w33-f32", "--waivers", "waivers.toml")
    assert (status, "passes although waived" in out) == (1, True)
    status, out = pytest(toy, *SUITE, "-k", "L1/add/t1-w33-f32", "--backend-option", "does=no f32")
    assert (status, "SKIPPED" in out, "float32 is not among Capabilities.dtypes" in out) == (0, True, True), out


def test_two_processes_collect_the_same(toy: Path) -> None:
    status, out = pytest(toy, *SUITE, "--conformance-level", "L1", "-k", ITEMS, "-n", "2")
    assert status == 0, out
    assert "passed" in out


def test_what_the_user_gets_wrong_is_one_line(toy: Path) -> None:
    for arguments, said in (
        ((), r"which backend\? give --backend NAME; registered: [a-z, ]*\btoy\b"),
        (("--backend", "toi"), r"UnknownBackend: unknown backend 'toi'"),
    ):
        status, out = pytest(toy, "--pyargs", "lineshaft_conformance", *arguments)
        assert (status, bool(re.search(said, out))) == (4, True), out
        assert "Traceback" not in out


def test_a_test_file_of_one_line_runs_the_suite_too(toy: Path) -> None:
    (toy / "test_backend.py").write_text("from lineshaft_conformance.test_conformance import *\n")
    (toy / "pytest.ini").write_text("[pytest]\naddopts = --backend toy --conformance-level L1\n")
    status, out = pytest(toy, "-k", "L1/add/t1-w33-f32", "-v")
    assert (status, "test_backend.py::test_check[L1/add/t1-w33-f32] PASSED" in out) == (0, True), out


def test_assertions_of_the_suite_are_rewritten(toy: Path) -> None:
    (toy / "test_it.py").write_text(
        "from lineshaft_conformance.harness import rig\n"
        "from lineshaft_conformance.levels import ops\n"
        "def test_it():\n"
        "    assert {type(m.__loader__).__name__ for m in (rig, ops)} == {'AssertionRewritingHook'}\n"
    )
    assert pytest(toy, "test_it.py")[0] == 0


def test_nothing_is_added_for_others(toy: Path) -> None:
    (toy / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--backend', default='agg')\n")
    (toy / "test_it.py").write_text(
        "import sys\n"
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.getoption('--backend') == 'theirs'\n"
        "    assert not hasattr(pytestconfig.option, 'conformance_level')\n"
        "    assert 'numpy' not in sys.modules and 'lineshaft' not in sys.modules\n"
        "    assert not any(line.startswith('l1') for line in pytestconfig.getini('markers'))\n"
    )
    status, out = pytest(toy, "test_it.py", "--backend", "theirs")
    assert status == 0, out


ABSENT = """
from lineshaft_contract.backends import Probe

def probe():
    return Probe(False, "no toy is plugged in", unless={"does": "stand in"})
"""


def test_an_option_stands_in_for_a_device(toy: Path) -> None:
    source = (toy / "toy.py").read_text()
    assert '"toy:probe"' in source
    (toy / "toy.py").write_text(source.replace('"toy:probe"', '"absent:probe"'))
    (toy / "absent.py").write_text(ABSENT)
    items = ("-k", "L0/load/probe or L1/add/t1-w33-f32", "-v")
    status, out = pytest(toy, *SUITE, *items)
    assert (status, "not usable here: no toy is plugged in" in out) == (4, True), out
    status, out = pytest(toy, *SUITE, *items, "--backend-option", "does=stand in")
    assert (status, "2 passed" in out) == (0, True), out
    status, out = pytest(toy, *SUITE, *items, "--backend-option", "does")
    assert (status, "--backend-option" in out) == (4, True), out
