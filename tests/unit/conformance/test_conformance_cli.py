"""Exit statuses and outputs of `lineshaft conformance`, with a toy plugin."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lineshaft.cli.main import main
from lineshaft_conformance.cli.acts import verdict
from lineshaft_conformance.results import Report, Result, Status

ONE = ["--backend", "toy", "--level", "L1", "--case", "L1/add/t1-w33-f32"]
WAIVER = """
[[waiver]]
case = "L1/add/*"
issue = "https://example.org/issues/1"
until = {until}
reason = "not written yet"
"""


@pytest.fixture
def lineshaft(capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a command; returns its status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main(["conformance", *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_a_run_that_passes(toy: Path, lineshaft: Any) -> None:
    status, out, err = lineshaft("run", *ONE, "--seed", 3, "--json", "--out", toy / "bundle")
    report = json.loads(out)
    assert report["facts"]["cases"] == ["L1/add/t1-w33-f32"]
    assert (status, report["seed"], [result["id"] for result in report["results"]]) == (0, 3, ["L1/add/t1-w33-f32"])
    assert "signed by sha256:" in err
    status, out, _ = lineshaft("verify", toy / "bundle", "--rerun", 1)
    assert (status, "internally consistent, signer unknown" in out) == (8, True)
    assert "1 of 1 checks tried again agree" in out
    (toy / "bundle" / "junit.xml").write_text("<testsuites/>")
    assert lineshaft("verify", toy / "bundle")[0] == 7
    assert lineshaft("diff", toy / "bundle", toy / "bundle")[0] == 7
    assert lineshaft("verify", toy / "absent")[0] == 7


def test_a_run_whose_bundle_cannot_be_written_still_tells_its_results(toy: Path, lineshaft: Any) -> None:
    status, out, err = lineshaft("run", *ONE, "--json", "--out", toy)
    assert (status, json.loads(out)["results"][0]["status"]) == (7, "pass")
    assert "in use and not a bundle" in err


def test_a_signed_bundle_verifies_with_its_key_and_a_second_try_can_contradict_it(toy: Path, lineshaft: Any) -> None:
    key, bundle, changed = toy / "k.pem", toy / "bundle", toy / "changed"
    assert lineshaft("keygen", key)[0] == 0
    assert key.stat().st_mode & 0o777 == 0o600
    assert lineshaft("keygen", key)[0] == 2
    assert lineshaft("run", *ONE, "--out", bundle, "--key", key)[0] == 0
    assert lineshaft("verify", bundle, "--key", f"{key}.pub")[0] == 0
    assert lineshaft("run", *ONE, "--seed", 1, "--out", changed)[0] == 0
    assert lineshaft("diff", bundle, bundle)[0] == 0
    assert lineshaft("diff", bundle, changed)[0] == 1
    status, out, _ = lineshaft("diff", bundle, changed, "--json")
    diff = json.loads(out)
    assert (status, diff["shared"], diff["counts"]["status"]) == (1, 1, 0)
    assert {"id": "", "what": "seed", "before": "0", "after": "1"} in diff["changes"]
    (toy / "toy.py").write_text((toy / "toy.py").read_text().replace('does: str = ""', 'does: str = "kernel raises"'))
    status, out, _ = lineshaft("verify", bundle, "--key", f"{key}.pub", "--rerun", 1)
    assert status == 7
    assert "as signed, but 1 of 1 checks tried again do not hold here\n  L1/add/t1-w33-f32 is fail now" in out
    assert "invalid" not in out
    (toy / "toy.py").write_text("raise RuntimeError('gone')")
    status, out, err = lineshaft("verify", bundle, "--key", f"{key}.pub", "--rerun", 1)
    assert (status, out, "'toy' does not load" in err) == (5, "", True)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--backend", "toi"], 3, "UnknownBackend: unknown backend 'toi'"),
        (["--backend", "toy", "--case", "L1/none"], 4, "UnknownCase: no check"),
        (["--backend", "toy", "--level", "L6"], 2, "'L6' is no level; allowed are L0"),
        (["--backend", "toy", "--size", "huge"], 2, "InvalidValue: size 'huge'"),
        (["--backend", "toy", "--jobs", "0"], 2, "at least 1"),
        (["--backend", "toy", "--seed", "-1"], 2, "no whole number of at least 0"),
        (["--backend", "toy", "--limit", "0"], 2, "a number above 0"),
        (["--backend", "toy", "--limit", "nan"], 2, "'nan': allowed is a number from 0 to 1e+06"),
        (["--backend", "toy", "--limit", "inf"], 2, "'inf': allowed is a number"),
        (["--backend", "toy", "--case", "x" * 100_000], 4, f"pattern '{'x' * 200}...'"),
        (["--backend", "toy", "--backend-option", "dose=x"], 2, "UnknownKey: "),
        (["--backend", "toy", "--key", "k"], 2, "give --out DIR"),
        (["--backend", "toy", "--out", "o", "--key", "absent.pem"], 2, "KeyFileError: "),
        (["--backend", "toy", "--waivers", "absent.toml"], 6, "WaiverError: "),
    ],
)
def test_what_the_user_gets_wrong(toy: Path, lineshaft: Any, arguments: list[str], status: int, said: str) -> None:
    got, out, err = lineshaft("run", *arguments)
    assert (got, out, err.count("\n")) == (status, "", 1)
    assert said in err


def test_failing_waived_and_expired(toy: Path, lineshaft: Any) -> None:
    run = ("run", *ONE, "--backend-option", "does=kernel raises")
    status, out, _ = lineshaft(*run)
    assert (status, "raised RuntimeError" in " ".join(out.split())) == (1, True)
    file = toy / "waivers.toml"
    file.write_text(WAIVER.format(until="2999-01-01"))
    assert lineshaft(*run, "--waivers", file)[0] == 0
    assert lineshaft("run", *ONE, "--waivers", file)[0] == 1  # it passes although waived
    file.write_text(WAIVER.format(until="2020-01-01"))
    assert lineshaft(*run, "--waivers", file)[0] == 6


def test_a_backend_that_does_not_load(toy: Path, lineshaft: Any) -> None:
    broken = ("--backend", "toy", "--backend-option", "does=factory raises")
    status, out, _ = lineshaft("run", *broken)
    assert (status, "L0/load/start" in out) == (5, True)
    status, _, err = lineshaft("list", *broken)
    assert (status, "does not load: raised RuntimeError: two lines" in err) == (5, True)
    assert lineshaft("soak", *broken, "--minutes", 0)[0] == 5


def test_list_names_ids_with_their_rule(toy: Path, lineshaft: Any) -> None:
    status, out, _ = lineshaft("list", *ONE)
    assert (status, out) == (0, "L1/add/t1-w33-f32  ops.add\n")


def test_soak(toy: Path, lineshaft: Any) -> None:
    soak = ("soak", "--backend", "toy", "--case", "L1/add/t1-w33-f32", "--minutes", 0)
    status, out, _ = lineshaft(*soak, "--least", 2)
    assert (status, out) == (0, "1 checks (0 not claimed), 2 seeds each, 2 tries, 0 failures\n")
    status, out, _ = lineshaft(*soak, "--repeat", 2, "--backend-option", "does=kernel raises")
    assert (status, out.count("L1/add/t1-w33-f32 seed 0: raised")) == (1, 2)


@dataclass
class FakeKill:
    killed: bool


@pytest.mark.parametrize(("killed", "status"), [(True, 0), (False, 9)])
def test_a_mutant_that_survives(monkeypatch: pytest.MonkeyPatch, lineshaft: Any, killed: bool, status: int) -> None:
    module = types.ModuleType("lineshaft_conformance.mutants.kill")
    kills = [FakeKill(True), FakeKill(killed)]
    vars(module).update(kill_all=lambda *given, **more: kills, kill_table=lambda found: f"{len(found)} rows")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert lineshaft("mutants")[:2] == (status, "2 rows\n")


def test_mutants_need_the_cpu_backend(monkeypatch: pytest.MonkeyPatch, lineshaft: Any) -> None:
    def absent(*given: Any, **more: Any) -> None:
        raise ImportError("No module named 'lineshaft_cpu'")

    module = types.ModuleType("lineshaft_conformance.mutants.kill")
    vars(module).update(kill_all=absent, kill_table=absent)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    status, _, err = lineshaft("mutants")
    assert (status, "install lineshaft-cpu" in err) == (5, True)


def test_a_level_without_a_pass_is_not_passed() -> None:
    def report(*results: Result) -> Report:
        return Report("b", {}, 1, "smoke", 0, results, "", 0.0)

    passed, other = Result("L0/a", 0, Status.PASS), Result("L1/a", 1, Status.NOT_CLAIMED)
    assert verdict(report(passed, other), whole=True) == 1
    assert verdict(report(passed, other), whole=False) == 0
    assert verdict(report(passed, Result("L1/a", 1, Status.PASS), other), whole=True) == 0


def test_the_help_explains_every_exit_status(lineshaft: Any) -> None:
    for arguments in (("--help",), ("run", "--help")):
        _, out, _ = lineshaft(*arguments)
        told = [line.split()[0] for line in out.partition("exit status:")[2].splitlines() if line.strip()]
        assert told == [*map(str, range(10)), "130"]
