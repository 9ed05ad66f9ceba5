"""The checks of collectives: right backends pass, broken ones are seen, and a mesh outlives neither a rank nor its
owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

from lineshaft_conformance.checks import Failure, NotClaimed
from lineshaft_conformance.harness import world
from lineshaft_conformance.harness.world import Collective, Exchange, Mesh, mesh_axes
from lineshaft_conformance.levels.collectives import FOUR, checks, groups_of
from lineshaft_conformance.mutants import collectives as mutants
from lineshaft_conformance.mutants.kill import TARGET
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.spec import Size

OPS = sorted(name for name, spec in all_ops().items() if spec.collective)
PAIR = mesh_axes(tp=2)
SUM = Exchange("float32", (2, 3), (Collective("all_reduce", ("tp",)),))
XS = [np.full((2, 3), 1.0, np.float32), np.full((2, 3), 4.0, np.float32)]


def ran(target: Target, pattern: str = "*", size: Size = "smoke") -> dict[str, str]:
    """What each check of the pattern said: "" for a pass."""
    subject = Subject(target)
    said = {}
    try:
        for check in checks(subject, size):
            if fnmatch(check.id, f"L3/collectives/{pattern}"):
                try:
                    check.run(subject, 0)
                    said[check.id] = ""
                except (Failure, NotClaimed) as outcome:
                    said[check.id] = f"{type(outcome).__name__}: {outcome}"
    finally:
        subject.close()
    return said


def test_ids_are_unique_and_every_op_is_checked_in_every_group_and_size() -> None:
    subject = Subject(Target("numpy"))
    smoke, full = ([check.id for check in checks(subject, size)] for size in ("smoke", "full"))
    assert len(set(full)) == len(full) and set(smoke) < set(full)
    for op in OPS:
        for group in ("world", "tp", "dp"):
            for part in ("small", "large"):
                assert any(id.startswith(f"L3/collectives/{op}/{group}-{part}-") for id in smoke), (op, group, part)
        assert any(f"{op}/tp3-" in id for id in full)


def test_groups_are_row_major_over_their_axes() -> None:
    assert groups_of(FOUR, ("dp", "tp")) == [[0, 1, 2, 3]]
    assert groups_of(FOUR, ("tp", "dp")) == [[0, 2, 1, 3]]
    assert groups_of(FOUR, ("tp",)) == [[0, 1], [2, 3]]
    assert groups_of(FOUR, ("dp",)) == [[0, 2], [1, 3]]


def test_a_backend_of_one_worker_passes_at_world_1_and_claims_no_more() -> None:
    said = ran(Target("numpy"))
    alone = {id for id in said if "/alone-" in id or "/refused/" in id}
    assert len(alone) == 2 * len(OPS) + 2
    assert {said[id] for id in alone} == {""}
    assert {said[id] for id in said.keys() - alone} == {"NotClaimed: Capabilities.collectives is False"}


def test_a_backend_with_collectives_passes() -> None:
    said = ran(TARGET, "all_[rg]*-small-*f32") | ran(TARGET, "minimum/*")
    assert len(said) > 12
    assert {id: reason for id, reason in said.items() if reason} == {}


KILLED = ("collective_ends_its_rank", "alone_receives_nothing", "collectives_that_decline")
"""Ways in which a mutant of collectives can fail; `lineshaft conformance mutants` has them all."""


@pytest.mark.parametrize("name", KILLED)
def test_a_mutant_is_killed(name: str) -> None:
    (mutant,) = (mutant for mutant in mutants.MUTANTS if mutant.name == name)
    said = ran(replace(TARGET, mutant=name), mutant.checks.removeprefix("L3/collectives/"))
    assert said and all(reason.startswith("Failure: ") for reason in said.values()), said


def test_every_mutant_names_checks_that_exist() -> None:
    ids = [check.id for check in checks(Subject(Target("numpy")), "smoke")]
    for mutant in mutants.MUTANTS:
        assert any(fnmatch(id, mutant.checks) for id in ids), mutant.name


def test_an_op_that_plans_what_its_axis_does_not_divide_is_seen() -> None:
    subject = Subject(Target("numpy"))
    gather = subject.ops["all_gather"]
    subject.ops = {**subject.ops, "all_to_all": gather, "reduce_scatter": gather}
    refusals = [check for check in checks(subject, "smoke") if check.id.endswith("refused/reduce_scatter")]
    with pytest.raises(Failure, match=r"raises Unsupported \(.*not ContractViolation"):
        refusals[0].run(subject, 0)


# ---- the mesh ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    made = Mesh(Target("cpu"), PAIR)
    yield made
    made.close()
    made.close()


def pids(mesh: Mesh) -> list[int]:
    return [child.process.pid for child in mesh._children]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_mesh_survives_a_rank_that_ends_or_hangs_and_says_which(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, got = mesh.run("first", [SUM], 0, XS)
    assert kernels and all((outputs[1] == 5).all() for outputs in got)
    first = pids(mesh)
    os.kill(first[1], signal.SIGKILL)
    with pytest.raises(Failure, match="rank 1 was killed by signal 9"):
        mesh.run("first", [SUM], 0, XS)
    assert not any(map(alive, first))
    with pytest.raises(Failure, match=r"the mesh broke before, on first: .*signal 9"):
        mesh.run("first", [SUM], 0, XS)

    mesh.run("second", [SUM], 0, XS)
    second = pids(mesh)
    monkeypatch.setattr(world, "ANSWER_SECONDS", 0.5)
    os.kill(second[0], signal.SIGSTOP)
    with pytest.raises(Failure, match=r"rank 0 gives no answer within 0\.5 s"):
        mesh.run("second", [SUM], 0, XS)
    assert not any(map(alive, second))


OWNER = """
import sys, time
from lineshaft_conformance.subject import Target
from lineshaft_conformance.harness.world import Mesh, mesh_axes
mesh = Mesh(Target("numpy"), mesh_axes(tp=2))
mesh._start()
print(*[child.process.pid for child in mesh._children], mesh._folder, flush=True)
time.sleep(60)
"""


def test_ranks_end_with_their_owner() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    *ranks, folder = owner.stdout.readline().split()
    assert len(ranks) == 2 and all(alive(int(pid)) for pid in ranks) and Path(folder).is_dir()
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(alive(int(pid)) for pid in ranks):
        os.sched_yield()
    assert not any(alive(int(pid)) for pid in ranks)
    assert not Path(folder).exists()


def test_a_backend_that_refuses_the_mesh_fails_the_check() -> None:
    refusing = Mesh(Target("numpy"), PAIR)
    try:
        with pytest.raises(Failure, match="rank 0 raised InvalidValue: backend 'numpy' runs one worker"):
            refusing.run("any", [SUM], 0, XS)
    finally:
        refusing.close()
