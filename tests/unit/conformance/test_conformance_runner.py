"""Plugins that raise, die, hang and print: each is the failure of one check, or of loading, and the run goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import BackendUnavailable, InvalidValue, UnknownBackend, UnknownKey
from lineshaft_conformance.checks import Check, Failure, Found, NotClaimed
from lineshaft_conformance.results import Evidence, Report, Result, Status
from lineshaft_conformance.runner import child
from lineshaft_conformance.runner.attempt import attempt, digest
from lineshaft_conformance.runner.child import last_words
from lineshaft_conformance.runner.pool import LOAD, Listed, Pool, Shares, Task
from lineshaft_conformance.runner.run import UnknownCase, further_seeds, merge, parse_size, run_suite, select, tasks
from lineshaft_conformance.runner.soak import soak
from lineshaft_conformance.subject import Target


def run(does: str = "", **more: Any) -> Report:
    return run_suite(Target("toy", {"does": does}), jobs=1, **more)


def test_every_way_to_fail_is_the_failure_of_one_check(toy: Path) -> None:
    report = run_suite(Target("toy"), jobs=2, collect="toy_checks:collect", seed=7)
    found = {result.id.rpartition("/")[2]: result for result in report.results}
    assert list(found) == [
        "held", "prints", "wrong", "refuse", "declines", "silent", "leaves", "ends", "die", "hang", "after"
    ]  # fmt: skip
    status = {name: result.status.name for name, result in found.items()}
    assert [name for name in status if status[name] == "PASS"] == ["held", "prints", "after"]
    assert [name for name in status if status[name] == "NOT_CLAIMED"] == ["declines"]
    reasons = {name: result.reason for name, result in found.items()}
    assert reasons["wrong"] == "2 of 3 values differ"
    assert reasons["declines"] == "no such dtype"
    assert reasons["silent"] == "declined without a reason"
    assert reasons["refuse"].startswith("raised RuntimeError: two lines (")
    assert "toy.py:" in reasons["refuse"]
    assert "in refuse)" in reasons["refuse"]
    assert reasons["leaves"].startswith("raised SystemExit: 4 (")
    assert reasons["ends"] == "ended the process with status 3; last output: 'bye'"
    assert reasons["die"].startswith("killed the process: signal 11 (Segmentation fault) (in ")
    assert "toy.py:" in reasons["die"] or "__init__.py" in reasons["die"]  # ctypes or the plugin
    assert reasons["die"].endswith("; last output: 'last thing said'")
    assert reasons["hang"].startswith("still running after 1 s (in ")
    assert "toy.py:" in reasons["hang"]
    assert found["held"].digest == digest([np.arange(3, dtype=np.float32)])
    assert found["held"].kernels == ("toy.k",)
    assert (found["held"].evidence, found["declines"].evidence) == (Evidence.EXECUTED, Evidence.DECLARED)
    assert {result.seed for result in report.results} == {7}
    assert (report.facts["plugin"], report.facts["kind"], report.facts["claims"]) == ("toy-plugin 1.5", "host", ["run"])
    assert "toy" not in sys.modules


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("factory raises", r"raised RuntimeError: two lines \(.*toy.py:.* in refuse\)"),
        ("factory dies", r"killed the process: signal 11 .*last thing said"),
        ("factory hangs", r"still running after 4 s \(in .*toy.py:"),
        ("kernels raise", "raised RuntimeError: two lines"),
    ],
)
def test_a_backend_that_does_not_start_is_one_failure(toy: Path, does: str, said: str) -> None:
    report = run(does, start_limit=4.0)
    (result,) = report.results
    assert (result.id, result.status, report.certified) == (LOAD, Status.FAIL, None)
    assert re.search(said, result.reason), result.reason


@pytest.mark.parametrize(
    ("code", "said"), [("1/0", "ZeroDivisionError"), ("import os; os._exit(9)", "ended the process with status 9")]
)
def test_a_plugin_that_fails_on_import_is_one_failure(toy: Path, code: str, said: str) -> None:
    (toy / "toy.py").write_text(code)
    (result,) = run_suite(Target("toy")).results
    assert (result.id, result.status) == (LOAD, Status.FAIL)
    assert said in result.reason


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("supports raises", "two lines"),
        ("kernel raises", "raised RuntimeError: two lines"),
        ("kernel dies", "killed the process: signal 11"),
        ("declines without a reason", "without a reason"),
    ],
)
def test_a_kernel_that_misbehaves_fails_the_cases_of_its_op_only(toy: Path, does: str, said: str) -> None:
    report = run(does, level=1, only=["L1/add/t1-w33-f32", "L1/silu_mul/*f32"])
    wrong = [result for result in report.results if result.status is Status.FAIL]
    assert [result.id for result in wrong] == ["L1/add/t1-w33-f32"]
    assert said in wrong[0].reason
    assert len(report.results) > 1


def test_what_the_user_gets_wrong_is_raised(toy: Path) -> None:
    with pytest.raises(UnknownBackend, match="unknown backend 'toi'; did you mean 'toy'"):
        run_suite(Target("toi"))
    with pytest.raises(UnknownKey, match="has no option"):
        run_suite(Target("toy", {"dose": "x"}))
    with pytest.raises(InvalidValue, match="odd option"):
        run("factory objects")
    with pytest.raises(UnknownCase, match=r"'L1/a/hold'; the nearest are L1/.*/held"):
        run_suite(Target("toy"), only=["L1/a/hold"], collect="toy_checks:collect")
    with pytest.raises(InvalidValue, match="level 6: allowed are 0 to 5"):
        run_suite(Target("toy"), level=6)
    for size in ("fuzz", "fuzz 0", "fuzz -1", "tiny", "FULL"):
        with pytest.raises(InvalidValue, match="allowed are smoke, full"):
            run_suite(Target("toy"), size=size)
    with (toy / "toy.py").open("a") as plugin:
        plugin.write("def probe(): return Probe(False, 'no board')\n")
    with pytest.raises(BackendUnavailable, match="no board"):
        run_suite(Target("toy"))


def test_a_fuzz_run_gives_one_result_a_check_and_the_first_failing_seed(toy: Path) -> None:
    report = run_suite(Target("toy"), size="fuzz 9", jobs=2, collect="toy_checks:collect_flaky")
    flaky, steady, declined = report.results
    odd = [seed for seed in further_seeds(0, 9) if seed % 2]
    assert (flaky.status, flaky.seed, flaky.notes) == (Status.FAIL, odd[0], (f"10 seeds, {len(odd)} failed",))
    assert (steady.status, steady.seed, steady.notes[-1]) == (Status.PASS, 0, "10 seeds, 0 failed")
    assert declined.status is Status.NOT_CLAIMED
    again = run_suite(Target("toy"), seed=odd[0], only=["L1/a/flaky"], collect="toy_checks:collect_flaky")
    assert again.results[0].status is Status.FAIL


def test_soaking_counts_seeds_and_tells_flakes(toy: Path) -> None:
    rounds: list[int] = []
    told = lambda soaked: rounds.append(soaked.seeds)  # noqa: E731
    found = soak(Target("toy"), 0.0, 6, jobs=2, collect="toy_checks:collect_flaky", told=told)
    assert (found.checks, found.seeds, found.tries, found.not_claimed) == (3, 6, 13, 1)
    assert rounds == [1, 2, 3, 4, 5, 6]
    assert found.failures
    assert {result.id for result in found.failures} == {"L1/a/flaky"}
    assert all(result.seed % 2 for result in found.failures)


def test_checks_of_speed_run_last_and_alone(toy: Path) -> None:
    with Pool(Target("toy"), jobs=2, collect="toy_checks:collect_speed") as pool:
        done = list(pool.run([Task(check, 0) for check in pool.checks]))
    assert [task.check.level for task, _ in done] == [1, 1, 1, 1, 5, 5]
    ends = [float(result.notes[0].removeprefix("at ")) for _, result in done]
    assert ends[4] >= max(ends[:4]) + 0.2
    assert ends[5] >= ends[4] + 0.2


def test_a_child_that_floods_or_leaves_its_group_is_still_ended(toy: Path) -> None:
    report = run_suite(Target("toy"), jobs=1, collect="toy_checks:collect_rebels")
    flood, strays, held = (result.reason for result in report.results)
    assert flood.startswith("still running after 2 s (in "), flood
    assert strays.startswith("still running after 1 s")
    assert held == ""


def test_output_beyond_a_measure_is_dropped(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "FLOOD", 1 << 16)
    with Pool(Target("toy"), jobs=1, collect="toy_checks:collect_rebels") as pool:
        flood = next(check for check in pool.checks if check.id.endswith("flood"))
        ((_, result),) = pool.run([Task(flood, 0)])
    assert result.reason.startswith("still running after 2 s (in "), result.reason


PARENT = """
import sys; sys.path[:] = {path!r}
from lineshaft_conformance.runner.run import run_suite
from lineshaft_conformance.subject import Target
if __name__ == "__main__":
    run_suite(Target("toy"), jobs=2, collect="toy_checks:collect_stuck")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_parent(toy: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    pids = toy / "pids"
    monkeypatch.setenv("TOY_PIDS", str(pids))
    command = [sys.executable, "-c", PARENT.format(path=sys.path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        until(lambda: pids.exists() and len(pids.read_text().split()) == 4, 60)
        parent.send_signal(number)
        assert parent.wait(10) != 0
    until(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()), 10)


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def listed(*ids: str) -> list[Listed]:
    return [Listed(id, "", "", "", "", 1.0) for id in ids]


def test_shares_keep_themes_together_and_are_stolen_by_halves() -> None:
    todo = [Task(check, 0) for check in listed(*(f"L1/a/{i}" for i in range(5)), "L1/b/0")]
    shares = Shares(todo)
    assert shares.next("w1") == todo[0]
    assert shares.next("w2") == todo[5]
    assert shares.next("w2") == todo[3]  # half of the four that w1 has left
    assert shares.next("w1") == todo[1]
    shares.give_back("w1")  # w1 is lost
    assert [shares.next("w3"), shares.next("w2"), shares.next("w3")] == [todo[2], todo[4], None]
    assert len(shares) == 0


def test_tasks_go_theme_by_theme_and_seed_by_seed() -> None:
    made = tasks(listed("L1/a/0", "L1/a/1", "L1/b/0"), [0, 1])
    assert [(task.check.id[3:], task.seed) for task in made] == [
        ("a/0", 0), ("a/1", 0), ("a/0", 1), ("a/1", 1), ("b/0", 0), ("b/0", 1)
    ]  # fmt: skip


def test_selecting_takes_ids_with_brackets_and_patterns_in_order() -> None:
    checks = listed("L1/a/x[1]", "L1/a/y", "L2/b/y")
    assert [check.id for check in select(checks, ["*/y", "L1/a/x[1]"])] == ["L1/a/x[1]", "L1/a/y", "L2/b/y"]
    assert select(checks, []) == tuple(checks)


def test_sizes() -> None:
    assert parse_size("full", 3) == ("full", (3,))
    size, seeds = parse_size("fuzz 2", 3)
    assert (size, seeds) == ("smoke", (3, *further_seeds(3, 2)))
    assert len(set(further_seeds(0, 1000))) == 1000


def attempted(run: Callable[[Any, int], Found]) -> tuple[Result, BaseException | None]:
    return attempt(Check("L2/a/b", run, op="o", dtype="float32", shape_class="c"), None, 5)  # type: ignore[arg-type]


def raising(error: BaseException) -> Callable[[Any, int], Found]:
    def check(subject: Any, seed: int) -> Found:
        raise error

    return check


def test_an_attempt_keeps_what_a_check_is_and_the_exception() -> None:
    result, error = attempted(lambda subject, seed: Found(notes=("n",)))
    assert (result.id, result.level, result.op, result.seed, result.digest, error) == ("L2/a/b", 2, "o", 5, "", None)
    failure = Failure("no")
    assert attempted(raising(failure))[1] is failure
    assert attempted(raising(NotClaimed("x")))[1] is None
    assert attempted(raising(KeyboardInterrupt()))[0].reason.startswith("raised KeyboardInterrupt (")


def test_the_digest_covers_dtype_shape_and_bytes() -> None:
    zeros = np.zeros((2, 3), np.float32)
    others = [zeros.astype(np.int32), zeros.reshape(3, 2), zeros + 1, zeros[:1]]
    assert len({digest([other]) for other in [zeros, *others]}) == 5
    assert digest([zeros.T]) == digest([np.ascontiguousarray(zeros.T)])
    assert digest([]) == ""


@pytest.mark.parametrize(
    ("statuses", "status"),
    [(("PASS", "FAIL", "PASS"), "FAIL"), (("NOT_CLAIMED", "PASS"), "NOT_CLAIMED"), (("PASS",), "PASS")],
)
def test_merging_tries(statuses: Sequence[str], status: str) -> None:
    tries = [Result("L1/a/b", 1, Status[name], seed=seed) for seed, name in enumerate(statuses)]
    assert merge(tries, Evidence.INTERPRETED).status is Status[status]


def test_last_words_of_a_process_that_said_nothing() -> None:
    assert last_words("") == ""
    assert last_words("x" * 1000 + "\n") == f"; last output: {'x' * 300!r}"
    assert os.sep not in last_words(
        'Fatal Python error: Aborted\n\nCurrent thread 0x1 (most recent call first):\n  File "/a/b/c.py", line 3 in f\n'
    ).removeprefix(" (in b/")
