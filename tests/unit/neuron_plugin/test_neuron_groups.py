"""Collectives inside programs of several ranks: against their references, one graph on all ranks, and lost peers."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.neuron_plugin.rank_programs import gloo, world

from lineshaft.errors import ContractViolation, WorkerDied
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.problems import CollectiveProblem
from lineshaft_neuron.collectives import FunctionalGroup, FunctionalGroups, peers

TIMEOUT_S = 120
OPS = {name: spec for name, spec in all_ops().items() if spec.collective}
PLACES: dict[str, dict[tuple[str, ...], list[list[int]]]] = {
    "pair": {("tp",): [[0, 1]]},
    "mesh": {("tp",): [[0, 1], [2, 3]], ("dp", "tp"): [[0, 1, 2, 3]]},
}
"""The groups of each scenario, over the axes that the cases of the ops have."""
RANKS = {"pair": 2, "mesh": 4, "again": 2, "lost": 2, "stuck": 2}


def cases(name: str) -> list[Any]:
    """(op, case, groups) of every smoke case whose group exists in the scenario; on the mesh of one dtype only."""
    return [
        (op, case, groups)
        for op, spec in OPS.items()
        for case in spec.cases(np.random.default_rng(5), "smoke")
        if len((groups := PLACES[name].get(case.problem.axis, [[]]))[0]) == case.problem.size
        and (name == "pair" or case.problem.dtype == "bfloat16")
    ]


def own_jobs(name: str) -> list[Any]:
    """Sums of int32, which are exact, and sums over each axis of the mesh, which are no sum over all."""
    operands = {rank: np.full(3, 10**rank, np.int32) for rank in range(RANKS[name])}
    axes = ["tp", "dp", "cp"] if name == "mesh" else ["tp", "cp"]
    sizes = {"tp": 2, "dp": 2, "cp": 1}
    return [
        ("all_reduce", CollectiveProblem(dtype="int32", axis=(axis,), size=sizes[axis], shape=(3,)), operands, (axis,))
        for axis in axes
    ]


def jobs(name: str) -> list[Any]:
    """What the ranks run: the cases, with the ranks of each group as its members, then the own ones."""
    found = []
    for op, case, groups in cases(name):
        operands = operand(case.args[0], case.problem)
        by_rank = {rank: operands[index] for group in groups for index, rank in enumerate(group)}
        found.append((op, case.problem, by_rank, case.args[1:]))
    return [*found, *own_jobs(name)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What the ranks of a scenario have found; all scenarios run at once, by one process that forks."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in PLACES:
        (folder / name).mkdir()
        (folder / name / "jobs").write_bytes(pickle.dumps(jobs(name)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.neuron_plugin.rank_programs", str(folder)]
    process = subprocess.Popen(
        [*command, *(f"{name}:{count}" for name, count in RANKS.items())],
        env=environment, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()

    def found(name: str, lasting: int | None = None) -> list[Any]:
        """Of the first `lasting` ranks, else of all."""
        paths = [folder / name / str(rank) for rank in range(lasting or RANKS[name])]
        assert all(path.exists() for path in paths), errors.decode()[-3000:]
        results = [pickle.loads(path.read_bytes()) for path in paths]
        assert not any(isinstance(result, str) for result in results), results
        return results

    return found


# ---- ranks in processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACES)
def test_collectives_in_one_program_agree_with_their_references(ranks: Any, name: str) -> None:
    found = [results for results, _, _ in ranks(name)]
    assert {op for op, _, _ in cases(name)} == set(OPS)
    wrong = []
    for index, (op, case, groups) in enumerate(cases(name)):
        for group in groups:
            wrong += compare(OPS[op], case, [found[rank][index] for rank in group])
    assert not wrong, "\n".join(wrong)


def test_a_sum_over_an_axis_is_that_of_its_members_and_exact_in_integers(ranks: Any) -> None:
    sums = {
        name: [[int(array[0]) for array in results[len(cases(name)) :]] for results, _, _ in ranks(name)]
        for name in PLACES
    }
    assert sums["pair"] == [[11, 1], [11, 10]]
    assert sums["mesh"] == [[11, 101, 1], [11, 1010, 10], [1100, 101, 100], [1100, 1010, 1000]]


@pytest.mark.parametrize("name", PLACES)
def test_all_ranks_compile_one_graph(ranks: Any, name: str) -> None:
    """Whatever their place in it, and whatever weights they hold."""
    assert len({digest for _, digest, _ in ranks(name)}) == 1


def test_a_report_lists_the_collectives_of_a_program_in_order(ranks: Any) -> None:
    (first, *others) = [collectives for _, _, collectives in ranks("mesh")]
    assert all(other == first for other in others)
    assert set(first) == {
        "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "wait_tensor",
    }  # fmt: skip
    assert first.count("wait_tensor") == len(first) / 2 and first[1::2] == ("wait_tensor",) * (len(first) // 2)


def test_sessions_of_one_process_share_its_world_and_open_it_again(ranks: Any) -> None:
    for rank, found in enumerate(ranks("again")):
        told = f"this process is rank {rank} of 2 and cannot be rank {rank} of 4 too"
        assert found[:7] == [1.0, False, 21.0, False, 201.0, 201.0, "LayoutError"]
        assert told in found[7] and found[8:] == [401.0, True, False]


def test_a_peer_that_ends_is_a_dead_worker_in_a_step_and_in_a_capture(ranks: Any) -> None:
    ((step, after, captured),) = ranks("lost", lasting=1)
    assert step[0] == "WorkerDied" and "a step: another worker ended or does not answer" in step[1]
    assert after[0] == "SessionPoisoned"
    assert captured[0] == "WorkerDied" and "a first step: another worker ended" in captured[1]


def test_a_peer_that_does_not_answer_is_a_dead_worker_after_the_timeout(ranks: Any) -> None:
    ((kind, text),) = ranks("stuck", lasting=1)
    assert kind == "WorkerDied" and "restart the run" in text and "\n" not in text


# ---- one rank --------------------------------------------------------------------------------------------------------


def test_a_rank_that_meets_nobody_is_told_and_may_try_again(tmp_path: Path) -> None:
    shared = gloo(0.5)
    for _ in range(2):
        groups = FunctionalGroups(world(0, tmp_path, tp=2), shared, torch.device("cpu"))
        with pytest.raises(WorkerDied, match="meeting all workers: another worker ended or does not answer"):
            groups.group("tp")
        groups.close()
        assert not torch.distributed.is_initialized()


def test_a_group_of_one_hands_its_input_back_and_meets_nobody(tmp_path: Path) -> None:
    groups = FunctionalGroups(world(0, tmp_path, tp=2), gloo(), torch.device("cpu"))
    group, x = groups.group(("dp", "cp")), torch.ones(3, 2)
    assert groups.group(("dp", "cp")) is group and group.size == 1
    results = [
        group.all_reduce(x), group.all_gather(x, 0), group.reduce_scatter(x, 0), group.all_to_all(x, 0, 1),
        group.broadcast(x, 0), group.permute(x, 1),
    ]  # fmt: skip
    assert all(result is x for result in results)
    groups.close()
    groups.close()
    assert not torch.distributed.is_initialized()


def test_a_dim_that_the_members_do_not_divide_is_refused() -> None:
    group = FunctionalGroup(("tp",), "a name", 2, False, torch.zeros(1, dtype=torch.int32))
    for call in (lambda: group.reduce_scatter(torch.ones(3, 2), 0), lambda: group.all_to_all(torch.ones(3, 2), 0, 1)):
        with pytest.raises(ContractViolation, match=r"the 2 members do not divide dim 0 of \[3, 2\]"):
            call()


@pytest.mark.parametrize(("own", "summed"), [(False, torch.float32), (True, torch.bfloat16)])
def test_sums_are_made_in_the_dtype_that_the_transport_asks_for(
    own: bool, summed: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def call(self: FunctionalGroup, op: str, x: torch.Tensor, *args: Any) -> torch.Tensor:
        given.append(x.dtype)
        return x

    monkeypatch.setattr(FunctionalGroup, "_call", call)
    group = FunctionalGroup(("tp",), "a name", 2, own, torch.zeros(1, dtype=torch.int32))
    x = torch.ones(4, 2, dtype=torch.bfloat16)
    assert group.all_reduce(x).dtype == group.reduce_scatter(x, 0).dtype == torch.bfloat16
    assert group.all_reduce(x.to(torch.int32)).dtype == torch.int32
    assert given == [summed, summed, torch.int32]


def test_a_failure_without_collectives_is_no_dead_worker() -> None:
    with pytest.raises(RuntimeError, match="of its own") as error, peers("a step", ()):
        raise RuntimeError("of its own")
    assert not isinstance(error.value, WorkerDied)
    with pytest.raises(ContractViolation, match="said"), peers("a step", ("all_reduce",)):
        raise ContractViolation("said")
    told = pytest.raises(WorkerDied, match=r"a step: another worker .*\(reset by peer\); restart the run")
    with told, peers("a step", ("all_reduce",)):
        raise RuntimeError("reset\n by peer")
