"""`lineshaft kernels`, the L0 checks of a toolchain and their evidence, with a backend whose devices are nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineshaft.cli import main as command_line
from lineshaft_conformance.checks import Failure, NotClaimed
from lineshaft_conformance.cli import kernels
from lineshaft_conformance.harness.abstract import MAKERS, zero_case
from lineshaft_conformance.harness.ahead import Outcome, real_trial, trials, try_kernel
from lineshaft_conformance.levels.ahead import checks
from lineshaft_conformance.matrix import Cell, Matrix, load_matrix
from lineshaft_conformance.results import Evidence, Status
from lineshaft_conformance.runner.attempt import attempt
from lineshaft_conformance.runner.run import run_suite
from lineshaft_conformance.subject import OnDevice, Subject, Target
from lineshaft_contract.ops import all_ops
from lineshaft_contract.problems import AttendProblem, CollectiveProblem, KVProblem, LinearProblem

FAR = Path(__file__).parents[1] / "far"
TARGETS = ("small:1x1", "big:2x4")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(install: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `lineshaft kernels`; returns status, stdout and stderr."""
    install(FAR)
    monkeypatch.setitem(command_line.COMMANDS, "kernels", kernels)

    def command(*arguments: object) -> tuple[int, str, str]:
        try:
            status = command_line.main(["kernels", *map(str, arguments)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture
def on(install: Callable[[Path], None]) -> OnDevice:
    install(FAR)
    return OnDevice(Target("far"), device="big:2x4")


# ---- the command -----------------------------------------------------------------------------------------------


def test_kernels_are_listed_without_the_device(run: Run) -> None:
    status, out, _ = run("list", "--backend", "far")
    lines = [line.split() for line in out.splitlines()]
    assert status == 0
    assert lines[0] == ["OP", "KERNEL", "PRIORITY", "LAYOUT", "VERSION", "HANDLES", "OPTIONS", "NOTE"]
    assert ["rope", "plain_rope", "10", "-", "3", "attention_factor,", "interleaved", "block=128", "-"] in lines
    found = json.loads(run("list", "--backend", "far", "--json")[1])
    (linear,) = [kernel for kernel in found if kernel["op"] == "linear"]
    assert linear == {
        "op": "linear", "name": "plain_linear", "priority": 0, "layout": "", "version": "1",
        "handles": ["adapters", "bias", "heads", "scheme"], "options": {}, "note": "",
    }  # fmt: skip
    assert len(json.loads(run("list", "--backend", "numpy", "--json")[1])) == len(all_ops())
    assert run("list", "--backend", "far", "--target", "big:2x4")[0] == 0
    status, _, err = run("list", "--backend", "far", "--target", "medium")
    assert (status, "known are small:1x1, big:2x4" in err) == (2, True)
    status, _, err = run("list", "--backend", "numpy", "--target", "big:2x4")
    assert (status, "no toolchain" in err) == (2, True)
    status, _, err = run("list", "--backend", "toolless")
    assert (status, "no device of it is here" in err) == (2, True)


def test_every_kernel_is_compiled_for_every_target(run: Run, tmp_path: Path) -> None:
    out, table = tmp_path / "m.json", tmp_path / "m.md"
    status, text, err = run("compile", "--backend", "far", "--jobs", 2, "--out", out, "--markdown", table)
    assert status == 0, text
    found = load_matrix(out)
    assert (found.backend, found.targets, found.columns) == ("far", TARGETS, ("scratch",))
    assert {(cell.op, cell.target) for cell in found.cells} == {(op, t) for op in all_ops() for t in TARGETS}
    by_place = {(cell.op, cell.target): cell for cell in found.cells}
    linear = by_place["linear", "small:1x1"]
    assert linear.outcome == "compiled"
    assert linear.problems[0]["problem"] == "dtype=bfloat16 n=4096 k=4096 m=32"
    figures = linear.problems[0]["figures"]
    assert (figures["scratch"], figures["outputs"], figures["temporaries"]) == (256, 32 * 4096 * 2, 32 * 4096)
    assert {p["problem"].split()[0] for p in linear.problems[1:]} == {"dtype=float32", "dtype=bfloat16"}
    gather = by_place["all_gather", "small:1x1"], by_place["all_gather", "big:2x4"]
    assert [cell.outcome for cell in gather] == ["declines", "compiled"]
    assert "cannot hold it" in gather[0].why
    assert by_place["latent_attend", "big:2x4"].problems[0]["outcome"] == "untried"
    assert f"{len(linear.compiled)}: temporaries 128.00 KiB, scratch 256" in text
    assert "evidence: compiled-only" in text.lower()
    rows = [line.split(" | ") for line in table.read_text().splitlines()]
    assert rows[0] == ["| OP", "KERNEL", "small:1x1", "big:2x4 |"]
    assert any(row[1] == "plain_all_gather" and row[2].startswith("declines: ") for row in rows if len(row) == 4)
    assert "0 failed" in err


def test_failures_crashes_and_kernels_that_take_nothing_are_told(run: Run, tmp_path: Path) -> None:
    chosen = ["--backend", "far", "--jobs", 2, "--targets", "big:*", "--kernels", "plain_linear,plain_add"]
    good = tmp_path / "good.json"
    assert run("compile", *chosen, "--out", good)[0] == 0
    status, _, err = run("compile", *chosen, "--against", good)
    assert status == 0 and f"2 cells compared with {good}: 0 regressions" in err
    status, out, err = run("compile", *chosen, "--backend-option", "does=linear fails", "--against", good)
    assert status == 1
    assert "FAILS plain_linear for big:2x4: real/0 [dtype=bfloat16 n=4096" in out
    assert "RuntimeError: out of scratch memory" in out
    assert "REGRESSION plain_linear compiled for big:2x4, and now it fails" in err
    status, out, _ = run("compile", *chosen, "--backend-option", "does=linear dies")
    assert status == 1 and "FAILS plain_linear" in out
    assert re.search(r"^add +plain_add +\d+: temporaries", out, re.MULTILINE)  # after the crash
    status, out, err = run("compile", *chosen, "--backend-option", "does=declines", "--json")
    assert status == 0
    assert [c["outcome"] for c in json.loads(out)["cells"]] == ["compiled", "declines"]
    status, out, err = run("compile", *chosen, "--backend-option", "does=declines", "--against", good)
    assert status == 1 and "plain_add declines every problem on every target" in out and "adds on no device" in out
    assert "REGRESSION plain_add" in err


def test_statuses_are_those_of_each_command_and_verbose_stands_anywhere(run: Run) -> None:
    help_of = {name: run(name, "--help")[1] for name in ("list", "compile")}
    assert "exit status:" in help_of["list"] and "--against" not in help_of["list"]
    assert "nothing was compared with --against" in help_of["compile"]
    for arguments in (("list", "-v"), ("-v", "list")):
        status, _, err = run(*arguments, "--backend", "far", "--backend-option", "speed=9")
        assert status == 2 and "Traceback" in err and "no option backend_options.speed" in err.splitlines()[-1]


def test_a_table_that_has_nothing_to_compare_is_an_error(run: Run, tmp_path: Path) -> None:
    chosen = ["--backend", "far", "--jobs", 1, "--targets", "big:*", "--kernels", "plain_add", "--problems", "first"]
    table = tmp_path / "t.json"
    assert run("compile", *chosen, "--table", table)[0] == 0
    whole = json.loads(table.read_text())
    other = [{**row, "target": "gfx942"} for row in whole["rows"]]
    for rows in ([], other):
        table.write_text(json.dumps({**whole, "rows": rows}))
        status, _, err = run("compile", *chosen, "--against", table)
        assert status == 2 and "no cell could be compared" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": None}, "k for s [p]: registers = None is no number"),
        ({"registers": "x"}, "k for s [p]: registers = 'x' is no number"),
        ({"registers": True}, "registers = True is no number"),
        ({"found": 3}, "found = 3 is no string"),
        ({"target": 3}, "kernel, op, target and reason are strings"),
        ({"registers": ...}, "k for s [p] has no registers"),
        ({"problem": ...}, "KeyError: 'problem'"),
        ({"op": ...}, "KeyError: 'op'"),
    ],
)
def test_a_malformed_row_is_told_before_anything_is_compiled(
    run: Run, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    row = {"kernel": "k", "op": "add", "target": "s", "problem": "p", "registers": 9, "spills": 0, "found": "none"}
    row = {name: value for name, value in (row | change).items() if value is not ...}
    table = {"backend": "b", "targets": ["s"], "columns": ["registers", "spills", "found"], "versions": {}}
    file = tmp_path / "t.json"
    file.write_text(json.dumps({**table, "rows": [row]}))
    status, out, err = run("compile", "--backend", "far", "--against", file)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "holds no matrix" in err and said in err
    bare = {**table, "rows": [{"kernel": "k", "op": "add", "target": "s", "problem": "p", "vmem": 3}]}
    file.write_text(json.dumps(bare))  # of a backend without registers
    assert load_matrix(file).count("compiled") == 1


def test_a_table_that_is_nested_too_deep_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text("[" * 200_000)
    status, out, err = run("compile", "--backend", "far", "--against", file)
    assert (status, out, err.count("\n")) == (2, "", 1) and "holds no matrix (RecursionError" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--targets", "medium"], "no target has the name or pattern 'medium'; there are small:1x1, big:2x4"),
        (["--kernels", "flash"], "no kernel has the name or pattern 'flash'"),
        (["--out", "."], "it cannot be written"),
        (["--markdown", "absent/m.md"], "it cannot be written"),
        (["--against", "absent.json"], "holds no matrix"),
        (["--jobs", "0"], "at least 1"),
        (["--backend-option", "does=no targets"], "lists no target"),
        (["--problems", "few"], "invalid choice: 'few'"),
        (["--table", "absent/t.json"], "it cannot be written"),
        (["--backend", "toolless"], "no toolchain"),
        (["--backend", "absent"], "absent"),
    ],
)
def test_bad_input_ends_before_any_work(run: Run, options: list[str], said: str) -> None:
    status, out, err = run("compile", "--backend", "far", *options)
    assert (status, out) == (2, "")
    assert said in err and err.count("\n") == 1


def test_a_regression_is_a_kernel_that_compiled_for_a_target_that_is_asked_for_again() -> None:
    ok, bad = {"outcome": "compiled"}, {"outcome": "fails", "id": "a", "problem": "p", "reason": "r"}
    before = Matrix("b", {}, ("s", "t"), (), tuple(Cell(k, "add", t, problems=(ok,)) for k in "kl" for t in "st"))
    now = replace(before, targets=("s",), cells=(Cell("k", "add", "s", problems=(ok, bad)),))
    assert now.regressions(before) == (
        "k compiled for s, and now it fails: a [p]: r", "l compiled for s, and now there is no such kernel",
    )  # fmt: skip
    assert now.regressions(before, ["l*"]) == ("l compiled for s, and now there is no such kernel",)
    assert before.regressions(now) == ()
    broken = replace(now, cells=(Cell("k", "add", "s", reason="its process ended"),))
    assert broken.regressions(before, ["k"]) == ("k compiled for s, and now it fails: its process ended",)


def test_code_that_is_worse_is_a_regression_and_a_little_growth_is_none() -> None:
    good = {"registers": 100, "shared_bytes": 64 << 10, "spills": 0, "stack_bytes": 0, "found": "mma.bf16+mma.f16"}

    def matrix(problem: str = "p", **figures: Any) -> Matrix:
        tried = {"id": "real/0", "problem": problem, "outcome": "compiled", "figures": good | figures}
        return Matrix("b", {}, ("s",), tuple(good), (Cell("k", "add", "s", problems=(tried,)),))

    before = matrix()
    for figures, said in (
        ({"registers": 110, "shared_bytes": 70 << 10, "found": "mma.bf16+mma.f16+mma.i8"}, ()),
        ({"registers": 64, "shared_bytes": 0}, ()),
        ({"registers": 111}, ("registers grew from 100 to 111 [p]",)),
        ({"shared_bytes": 72 << 10}, ("shared_bytes grew from 65536 to 73728 [p]",)),
        ({"spills": 1, "stack_bytes": 4}, ("spills rose from 0 to 1 [p]", "stack_bytes rose from 0 to 4 [p]")),
        ({"found": "mma.bf16"}, ("mma.f16 is not in its code any more [p]",)),
        ({"found": "none"}, ("mma.bf16, mma.f16 is not in its code any more [p]",)),
        ({"problem": "q"}, ("does not compile [p] any more",)),
    ):
        assert matrix(**figures).regressions(before) == tuple(f"k for s: {text}" for text in said)
    assert matrix(registers=20).regressions(matrix(registers=13)) == ()  # a tenth, but not 8 of them
    assert matrix(spills=5).regressions(matrix(spills=3)) == ()  # it never did without


def test_a_table_keeps_a_line_for_each_cell_and_its_reasons(tmp_path: Path) -> None:
    first = {"id": "real/0", "problem": "p", "outcome": "compiled", "figures": {"registers": 9, "seconds": 1.5}}
    refusals = [("q", "never heard of it"), ("p", "no such instructions")]
    declined = tuple({"id": "x", "problem": p, "outcome": "declines", "reason": why} for p, why in refusals)
    cells = (
        Cell("k", "add", "s", problems=(first, {**first, "problem": "q"}), seconds=3.0),
        Cell("k", "add", "t", problems=declined), Cell("l", "add", "s", reason="its process ended"),
    )  # fmt: skip
    whole = Matrix("b", {"o": 1}, ("s", "t"), ("registers",), cells, {"cpu": "fast", "requires": {"compiler": "3.9"}})
    assert whole.why(cells[1]) == "no such instructions"  # for what another target takes
    file = tmp_path / "t.json"
    file.write_text(whole.brief())
    assert "fast" not in file.read_text() and "seconds" not in file.read_text()
    rows = [json.loads(line.strip().rstrip(",")) for line in file.read_text().splitlines() if '"kernel"' in line]
    assert rows == [
        {"kernel": "k", "op": "add", "target": "s", "problem": "p", "registers": 9},
        {"kernel": "k", "op": "add", "target": "t", "declines": "no such instructions"},
        {"kernel": "l", "op": "add", "target": "s", "fails": "its process ended"},
    ]
    found = load_matrix(file)
    assert (found.backend, found.targets, found.columns) == ("b", ("s", "t"), ("registers",))
    assert [cell.outcome for cell in found.cells] == ["compiled", "declines", "fails"]
    assert found.facts == {"requires": {"compiler": "3.9"}} and found.brief() == whole.brief()
    assert whole.regressions(found) == () and [whole.count(cell.outcome) for cell in cells] == [1, 1, 1]


def test_a_run_is_shared_out_over_the_backends_that_know_the_targets(run: Run) -> None:
    status, out, err = run("compile", "--targets", "small:1x1")
    assert (status, out) == (2, "")
    assert "target 'small:1x1' is one of far and far-single; choose one by --backend" in err
    status, out, err = run("compile", "--targets", "small:*,medium")
    assert status == 2 and "no target has the name or pattern 'medium'; there are " in err
    assert all(name in err for name in (*TARGETS, "v5e", "sm90", "gfx942"))
    status, out, err = run("compile", "--targets", "small:1x1", "--backend-option", "does=declines")
    assert status == 2 and "--backend-option without --backend" in err


def test_the_first_the_real_or_all_problems_are_compiled(run: Run, tmp_path: Path) -> None:
    chosen = ["--backend", "far", "--jobs", 1, "--targets", "big:*", "--kernels", "plain_linear,plain_add"]
    found = {}
    for problems in ("first", "real", "all"):
        out = tmp_path / f"{problems}.json"
        assert run("compile", *chosen, "--problems", problems, "--out", out)[0] == 0
        found[problems] = {cell.op: [p["id"] for p in cell.problems] for cell in load_matrix(out).cells}
    assert found["first"]["linear"] == found["real"]["linear"] == ["real/0"]
    assert len(found["first"]["add"]) == len(found["real"]["add"]) == 1  # it has no real problem
    assert len(found["all"]["linear"]) > 2 and len(found["all"]["add"]) > 1


# ---- problems without a case -----------------------------------------------------------------------------------


def test_operands_of_real_problems_take_no_memory_and_lead_to_the_same_problem(on: OnDevice) -> None:
    given: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_heads": 8,
        "qk_dim": 128,
        "v_dim": 128,
        "page_size": 16,
        "kv_dtype": "bfloat16",
    }
    step: dict[str, Any] = {"tokens": 64, "rows": 64, "pages": 2048, "max_query": 1, "q_heads": 32, "scale": 0.1}
    problems = [
        ("attend", AttendProblem(**given, **step)),
        ("attend", AttendProblem(**given, **step, group=1, sinks=True, page_starts=True, key_ranges=True)),
        ("attend", AttendProblem(**{**given, "kv_dtype": "int8"}, **step, kv_scheme="head", return_lse=True)),
        ("attend", AttendProblem(**{**given, **step, "v_dim": 64, "max_query": 8}, value_in_key=True, ancestors=True)),
        ("write_kv", KVProblem(**given, rows=512)),
        ("write_kv", KVProblem(**{**given, "kv_dtype": "int8"}, rows=512, kv_scheme="token_head", group=1)),
        ("write_kv", KVProblem(**{**given, "v_dim": 0}, rows=7)),
        ("linear", LinearProblem(dtype="bfloat16", m=512, n=28672, k=4096, bias=True)),
        ("head_linear", LinearProblem(dtype="bfloat16", m=64, n=512, k=128, heads=16)),
        ("all_reduce", CollectiveProblem(dtype="bfloat16", axis=("tp",), size=4, shape=(64, 4096))),
        ("all_to_all", CollectiveProblem(dtype="float32", axis=("tp",), size=2, shape=(64, 128), dim=1, concat_dim=0)),
    ]  # fmt: skip
    for op, problem in problems:
        spec, (kernel,) = on.ops[op], [kernel for kernel in on.kernels if kernel.op == op]
        seen: list[str] = []

        def look(rig: Any, seen: list[str] = seen) -> None:
            seen += [entry.problem for entry in rig.planned.plan.entries]

        tried = try_kernel(on, kernel, real_trial(spec, "real/0", problem), look)
        assert (tried.outcome, tried.reason) == (Outcome.COMPILED, "")
        assert seen == [problem.describe()]
    case = zero_case(*problems[0])
    assert case is not None and sum(case.args[1].pages["k"].strides) == 0


def test_every_op_whose_operands_are_made_takes_its_cases_problems(on: OnDevice) -> None:
    for op in MAKERS:
        (kernel,) = [kernel for kernel in on.kernels if kernel.op == op]
        for case in on.ops[op].cases(np.random.default_rng(0), "smoke"):
            if case.problem.dtype in on.capabilities.dtypes and not case.id.startswith("all_padding"):
                tried = try_kernel(on, kernel, real_trial(on.ops[op], "real/0", case.problem))
                assert tried.outcome is Outcome.COMPILED, (op, case.id, tried.reason)


def test_one_case_for_each_dtype_scheme_and_set_of_features(on: OnDevice) -> None:
    (attend,) = [kernel for kernel in on.kernels if kernel.op == "attend"]
    found = [trial.problem for trial in trials(on, attend)]
    keys = [(p.dtype, p.kv_dtype, p.kv_scheme, p.features()) for p in found[1:]]  # type: ignore[attr-defined]
    assert len(set(keys)) == len(keys) > 20
    everything = {case.problem.features() for case in on.ops["attend"].cases(np.random.default_rng(0), "smoke")}
    assert {features for *_, features in keys} == everything


# ---- the checks ------------------------------------------------------------------------------------------------


def test_a_right_toolchain_passes_and_a_backend_without_one_claims_nothing(install: Callable[[Path], None]) -> None:
    install(FAR)
    subject = Subject(Target("far", {"here": "true"}))
    results = [attempt(check, subject, 0)[0] for check in checks(subject, "full")]
    assert {result.id for result in results} >= {"L0/ahead/targets", "L0/ahead/attend/big:2x4"}
    assert not [(r.id, r.reason) for r in results if r.status is Status.FAIL]
    declined = [result.id for result in results if result.status is Status.NOT_CLAIMED]
    assert declined and all("small:1x1" in id for id in declined)  # collectives, on one device
    without = Subject(Target("numpy"))
    (check,) = checks(without, "smoke")
    with pytest.raises(NotClaimed, match="no toolchain"):
        check.run(without, 0)


def test_a_kernel_that_does_not_compile_fails_its_check(install: Callable[[Path], None]) -> None:
    install(FAR)
    subject = Subject(Target("far", {"here": "true", "does": "linear fails"}))
    by_id = {check.id: check for check in checks(subject, "smoke")}
    for target in TARGETS:
        with pytest.raises(Failure, match=f"plain_linear on {target}, real/0 .* out of scratch memory"):
            by_id[f"L0/ahead/linear/{target}"].run(subject, 0)
    assert by_id["L0/ahead/add/big:2x4"].run(subject, 0).kernels == ("plain_add",)
    declines = Subject(Target("far", {"here": "true", "does": "declines"}))
    with pytest.raises(NotClaimed, match="adds on no device"):
        by_id["L0/ahead/add/big:2x4"].run(declines, 0)


def test_what_was_compiled_and_not_run_is_compiled_only(install: Callable[[Path], None]) -> None:
    install(FAR)
    only = ["L0/ahead/linear/*", "L0/ahead/all_gather/*", "L0/load/options"]
    report = run_suite(Target("far", {"here": "true"}), level=0, jobs=1, only=only)
    words = {result.id: (result.status, result.evidence) for result in report.results}
    assert words == {
        "L0/ahead/linear/small:1x1": (Status.PASS, Evidence.COMPILED_ONLY),
        "L0/ahead/linear/big:2x4": (Status.PASS, Evidence.COMPILED_ONLY),
        "L0/ahead/all_gather/small:1x1": (Status.NOT_CLAIMED, Evidence.DECLARED),
        "L0/ahead/all_gather/big:2x4": (Status.PASS, Evidence.COMPILED_ONLY),
        "L0/load/options": (Status.PASS, Evidence.INTERPRETED),
    }
