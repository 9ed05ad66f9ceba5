"""The threads of the native engine: how many, what they compute however many there are, and how they end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from tests.unit.cpu_plugin.engines import PANELS, SLOTS, miniature
from tests.unit.cpu_plugin.taped import run

from lineshaft_contract.errors import InvalidValue, OutOfMemory, SessionClosed
from lineshaft_contract.host import usable_cpus
from lineshaft_contract.problems import PointwiseProblem
from lineshaft_cpu import native
from lineshaft_cpu.engine.team import MOST, Team, quota, team_size

ROOT = Path(__file__).parents[3]
LIMIT = 60
"""Seconds for a process that takes two."""

# ---- how many --------------------------------------------------------------------------------------------------------


def test_as_many_as_are_asked_for_or_as_there_are_processors(tmp_path: Path) -> None:
    assert team_size(0, tmp_path) == usable_cpus()
    assert [team_size(n, tmp_path) for n in (1, usable_cpus() + 3, MOST)] == [1, usable_cpus() + 3, MOST]


@pytest.mark.parametrize("asked", [-1, MOST + 1, 10_000])
def test_a_number_that_no_machine_has_is_refused(asked: int) -> None:
    with pytest.raises(InvalidValue, match=rf"threads = {asked}: allowed are 1 to {MOST}, or 0"):
        team_size(asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", None), ("400000 100000\n", 4.0), ("150000 100000", 1.5), ("50000 100000", 0.5),
        ("0 100000", None), ("100000 0", None), ("-1 100000", None),
        ("", None), ("100000", None), ("many few", None), ("1 2 3", None),
    ],
)  # fmt: skip
def test_a_quota_of_version_2(tmp_path: Path, text: str, expected: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert quota(tmp_path) == expected
    size = usable_cpus() if expected is None else max(1, min(usable_cpus(), int(expected)))
    assert team_size(0, tmp_path) == size
    assert team_size(7, tmp_path) == 7, "what is asked for is taken"


@pytest.mark.parametrize(
    ("limit", "period", "expected"),
    [("-1\n", "100000\n", None), ("250000\n", "100000\n", 2.5), ("20000", "100000", 0.2), ("x", "100000", None)],
)
def test_a_quota_of_version_1(tmp_path: Path, limit: str, period: str, expected: float | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(limit)
    assert quota(tmp_path) is None, "one of the two files is not there"
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text(period)
    assert quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b\n", {"other/cpu.max": "100000 100000"}, None),
        ("3:cpuset:/b\n2:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "50000"}, 0.5),
        ("no\nlines: of\nthis\n", {"cpu.max": "100000 100000"}, 1.0),
    ],
)
def test_the_tightest_of_nested_groups_counts(
    tmp_path: Path, own: str, limits: dict[str, str], expected: float | None
) -> None:
    for name, text in limits.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.with_name("cpu.cfs_period_us").write_text("100000")
    told = tmp_path / "own"
    told.write_text(own)
    assert quota(tmp_path, told) == expected


def test_a_system_that_gives_no_thread_is_out_of_memory() -> None:
    functions = {f"lineshaft_{name}": lambda *_: None for name in ("team_start", "team_stop", "submit", "wait")}
    with pytest.raises(OutOfMemory, match=r"no team of 3 threads.*ulimit -u"):
        Team(native.Native("none", functions), 3)  # type: ignore[arg-type]


# ---- what they compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
def test_a_result_does_not_depend_on_the_threads(threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((300, 2 * 515)).astype(np.float32)
    problem = PointwiseProblem(dtype="float32", rows=300, width=515)
    alone, together = (run("cpu_silu_mul", problem, x, threads=n)[0] for n in (1, threads))
    assert alone.tobytes() == together.tobytes()


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("layout", [PANELS, SLOTS], ids=["panels", "slots"])
def test_steps_are_right_on_a_team_of_any_size(threads: int, layout: object) -> None:
    with miniature(threads, layout) as model:  # type: ignore[arg-type]
        rows = [model.add() for _ in range(3)]
        for tokens in (9, 1, 1, 3):
            model.step(*((row, tokens) for row in rows[: 16 // tokens]))
        model.check_pages()


def test_two_sessions_step_at_once() -> None:
    failed: list[BaseException] = []

    def steps(seed: int) -> None:
        try:
            with miniature(3, seed=seed) as model:
                row = model.add()
                for _ in range(25):
                    model.step((row, 1))
                model.check_pages()
        except BaseException as error:
            failed.append(error)

    threads = [Thread(target=steps, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not failed and not any(thread.is_alive() for thread in threads)


# ---- how they end ----------------------------------------------------------------------------------------------------


def test_a_session_is_closed_once_and_a_step_under_way_is_waited_for() -> None:
    model = miniature(2)
    row = model.add()
    before = len(os.listdir("/proc/self/task"))
    begun = model.submit((row, 5))
    model.rig.session.close()
    begun.check()
    assert len(os.listdir("/proc/self/task")) == before - 1
    model.rig.session.close()
    with pytest.raises(SessionClosed):
        model.submit((row, 1), poison=False)


def test_a_session_that_nobody_holds_ends_its_threads() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    model = miniature(3)
    row = model.add()
    model.submit((row, 5))
    assert len(os.listdir("/proc/self/task")) == before + 2
    del model, row
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == before


def test_a_team_is_closed_once() -> None:
    team = Team(native.load(), 4)
    team.close()
    team.close()


def process(script: str) -> str:
    """What a process of its own prints that runs the script; it has to end in time and well."""
    text = "from tests.unit.cpu_plugin.engines import *\n" + script
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Fatal Python error" not in done.stderr
    return done.stdout


FORKS = """
import os, sys
model = miniature(3)
row = model.add()
model.step((row, 3))
child = os.fork()
model.step((row, 1))
model.step((row, 2))
model.check_pages()
if child:
    os.write(1, b"parent\\n")
    sys.exit(os.waitpid(child, 0)[1])
os.write(1, b"child\\n")
"""


def test_a_child_of_fork_steps_alone_and_ends() -> None:
    assert sorted(process(FORKS).split()) == ["child", "parent"]


def test_a_child_closes_what_its_parent_began() -> None:
    assert process(FORKS.replace("if child:", "model.rig.session.close()\nif child:")).split()


EXITS = """
import threading, time
begun = threading.Event()
def forever():
    model = miniature(3)
    row = model.add()
    model.step((row, 3))
    host = model.rig.host(model._inputs(model.shapes[0], ()), 0)
    begun.set()
    while True:
        model.rig.programs[0](host)
threading.Thread(target=forever, daemon=True).start()
assert begun.wait(30)
time.sleep(0.05)
print("left")
"""


def test_an_interpreter_exits_while_another_thread_is_in_a_step() -> None:
    for _ in range(3):
        assert process(EXITS) == "left\n"


def test_an_interpreter_exits_while_a_step_is_under_way() -> None:
    assert process("model = miniature(3)\nrow = model.add()\nmodel.submit((row, 9))\nprint('left')") == "left\n"


ENDS_LAST = """
import atexit
atexit.register(lambda: print("closed", model.rig.session.closed))
model = miniature(3)
model.submit((model.add(), 9))
"""


def test_an_interpreter_closes_a_session_before_it_takes_its_memory_away() -> None:
    assert process(ENDS_LAST) == "closed True\n"


INTERRUPTED = """
model = miniature(3)
row = model.add()
model.step((row, 3))
session = model.rig.session
host = model.rig.host(model._inputs(model.shapes[0], ()), 0)
def interrupt(*_):
    raise KeyboardInterrupt
session.submitted = interrupt
try:
    model.rig.programs[0](host)
except KeyboardInterrupt:
    session.close()
    print("closed")
"""


def test_ctrl_c_at_the_beginning_of_a_step_leaves_a_session_that_can_be_closed() -> None:
    for _ in range(3):
        assert process(INTERRUPTED) == "closed\n"


def test_ctrl_c_while_a_step_is_waited_for_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with miniature(2) as model:
        row = model.add()
        begun = model.submit((row, 5))
        team = model.rig.session.team  # type: ignore[attr-defined]
        waits = team.wait

        def interrupt() -> float:
            waits()
            raise KeyboardInterrupt

        monkeypatch.setattr(team, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            begun.check()
        monkeypatch.undo()
        begun.check()
