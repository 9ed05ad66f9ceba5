"""What `lineshaft explain` prints of a plan, with a plan made by hand."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest

from lineshaft.cli.main import main
from lineshaft.plan.plan import Plan, PlanEntry, make_entry
from lineshaft.plan.resolve import Rejection
from lineshaft_contract.backends import API_VERSION
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import ConstProblem
from lineshaft_contract.steps import StepShape


def entry(op: str, problem: str, kernel: str, *rejected: Rejection) -> PlanEntry:
    return PlanEntry(op, problem, "float32", kernel, "1", "", {}, rejected, 1)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    slow = Rejection("slow", "does not handle window")
    entries = (entry("add", "rows=1", "a"), entry("add", "rows=2", "a"), entry("attend", "rows=1", "b", slow))
    made = Plan("fake", (StepShape(8, 2, (4,), 2, 1),), entries, {}, "", 0, 0)
    module = types.ModuleType("lineshaft.explain")
    module.explain = lambda config: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lineshaft.explain", module)
    return made


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    assert main(["explain", "--model", "m", *arguments]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_one_row_for_each_op_and_kernel_with_its_rejections(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys)
    assert rows[0] == ["OP", "DTYPE", "KERNEL", "PROBLEMS", "REJECTED"]
    assert rows[1] == ["add", "float32", "a", "2", "-"]
    assert rows[2] == ["attend", "float32", "b", "1", "slow:", "does", "not", "handle", "window"]
    assert rows[-1][:2] == ["plan", plan.hash]


def test_each_table_of_buckets_has_a_line_on_its_padding(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = [StepShape(n, n, (4,), n, 1) for n in (1, 2, 4)]
    prefill = [StepShape(n, 1, (4,), rows, n) for n in (128, 256, 512) for rows in (1, 4)]
    sampling = [StepShape(0, n, (), n, 0) for n in (1, 2, 4)]
    tabled = replace(plan, shapes=(*reversed(prefill), *decode, *sampling))
    monkeypatch.setattr(sys.modules["lineshaft.explain"], "explain", lambda config: tabled)
    assert main(["explain", "--model", "m"]) == 0
    told = capsys.readouterr().out
    assert "prefill buckets 128, 256, 512: 27.1% of tokens are padding for sizes uniform in 1..512\n" in told
    assert "decode buckets 1, 2, 4: 9.1% of rows are padding for sizes uniform in 1..4\n" in told


def test_rejections_of_one_reason_share_it_and_the_rarest_reasons_come_first(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [Rejection(f"int8_{i}", "is for int8") for i in range(4)] + [Rejection("fp8", "is for fp8")]
    few = [Rejection("wide", "takes 9 rows"), Rejection("a", "takes 1 row"), Rejection("b", "takes 1 row")]
    rejecting = replace(plan, entries=(entry("linear", "rows=4", "c", *many, *few),))
    monkeypatch.setattr(sys.modules["lineshaft.explain"], "explain", lambda config: rejecting)
    assert main(["explain", "--model", "m"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.endswith("  fp8: is for fp8; wide: takes 9 rows; a, b: takes 1 row; +4 more, see --json")
    assert main(["explain", "--model", "m", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["entries"][0]["rejected"]) == 8


def test_a_kernel_of_the_next_contract_version_is_marked(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = Kernel("b", "attend", "fake", lambda problem, session: None, api=API_VERSION + 1)
    marked = make_entry("attend", ConstProblem(dtype="int32", shape=(1,)), new, (), 1)
    newer = replace(plan, entries=(*plan.entries[:2], marked))
    monkeypatch.setattr(sys.modules["lineshaft.explain"], "explain", lambda config: newer)
    note = f"b (written for contract version {API_VERSION + 1})"
    for arguments in ((), ("--shapes",)):
        assert main(["explain", "--model", "m", *arguments]) == 0
        assert note in capsys.readouterr().out
    assert note in newer.summary()
    assert note not in plan.summary()


def test_shapes_has_a_row_for_each_problem_and_bucket(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "--shapes")
    assert [row[:3] for row in rows[1:4]] == [["add", "rows=1", "a"], ["add", "rows=2", "a"], ["attend", "rows=1", "b"]]
    assert ["8", "2", "(4,)", "2", "1"] in rows


def test_json_is_the_whole_plan(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan.to_json()))
