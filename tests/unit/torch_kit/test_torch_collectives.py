"""Collectives among spawned processes: three ranks on one axis, four on 2 x 2 with subgroups, and a missing rank."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import ContractViolation
from lineshaft_contract.backends import World
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.run import compare, operand
from lineshaft_torch.collectives import GLOO, Group, ProcessGroups, members_of

TIMEOUT_S = 60
OPS = {name: spec for name, spec in all_ops().items() if spec.collective}

WORKER = """
import pickle, sys
import torch
from lineshaft_contract.backends import World
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions, TorchSession

rank, folder, timeout = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
torch.set_num_threads(1)
axes, jobs = pickle.load(open(folder + "/jobs", "rb"))
world = World(rank, axes, rendezvous=folder + "/store")
session = TorchSession("cpu", world, SessionOptions(timeout_s=timeout))
kernels = {kernel.op: kernel for kernel in portable_kernels("cpu")}
results = []
with torch.inference_mode():
    for op, problem, operands, rest in jobs:
        x = from_host(operands[rank])
        before = x.clone()
        got = kernels[op].bind(problem, session)(x, *rest)
        assert torch.equal(x.view(torch.uint8), before.view(torch.uint8)), op + " changed its input"
        results.append(to_host(got))
session.close()
session.close()
pickle.dump(results, open(f"{folder}/result{rank}", "wb"))
"""


def run_ranks(folder: Path, axes: Any, jobs: Any, ranks: list[int], timeout: float = TIMEOUT_S) -> list[Any]:
    (folder / "jobs").write_bytes(pickle.dumps((axes, jobs)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder), str(timeout)], env=environment, stderr=subprocess.PIPE)
        for rank in ranks
    ]
    try:
        errors = [worker.communicate(timeout=TIMEOUT_S)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    failed = [error for worker, error in zip(workers, errors, strict=True) if worker.returncode]
    return failed or [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in ranks]


def mesh(**degrees: int) -> tuple[tuple[str, int], ...]:
    return tuple((axis, degrees.get(axis, 1)) for axis in ("dp", "pp", "cp", "ep", "tp"))


def jobs_over(axes: Any, places: dict[tuple[str, ...], list[list[int]]]) -> tuple[list[Any], list[Any]]:
    """(jobs, checks) of every smoke case whose group exists on the mesh; each set of ranks runs the same case."""
    jobs, checks = [], []
    for op, spec in OPS.items():
        for case in spec.cases(np.random.default_rng(5), "smoke"):
            groups = places.get(case.problem.axis)
            if groups is None or len(groups[0]) != case.problem.size:
                continue
            operands = operand(case.args[0], case.problem)
            by_rank = {rank: operands[index] for group in groups for index, rank in enumerate(group)}
            jobs.append((op, case.problem, by_rank, case.args[1:]))
            checks.append((spec, case, groups))
    return jobs, checks


@pytest.mark.parametrize(
    ("degrees", "places"),
    [
        ({"tp": 3}, {("tp",): [[0, 1, 2]]}),
        ({"dp": 2, "tp": 2}, {("tp",): [[0, 1], [2, 3]], ("dp", "tp"): [[0, 1, 2, 3]]}),
    ],
    ids=["tp3", "dp2xtp2"],
)
def test_collectives_agree_with_their_references(tmp_path: Path, degrees: Any, places: Any) -> None:
    axes = mesh(**degrees)
    ranks = list(range(np.prod(list(degrees.values()))))
    jobs, checks = jobs_over(axes, places)
    assert {op for op, *_ in jobs} == set(OPS)
    results = run_ranks(tmp_path, axes, jobs, ranks)
    assert not isinstance(results[0], str), results
    wrong = []
    for index, (spec, case, groups) in enumerate(checks):
        for group in groups:
            wrong += compare(spec, case, [results[rank][index] for rank in group])
    assert not wrong, "\n".join(wrong)


def test_a_subgroup_sums_over_its_own_members_only(tmp_path: Path) -> None:
    from lineshaft_contract.problems import CollectiveProblem

    operands = {rank: np.full((2,), 10.0**rank, np.float32) for rank in range(4)}
    jobs = [
        ("all_reduce", CollectiveProblem(dtype="float32", axis=(axis,), size=2, shape=(2,)), operands, (axis,))
        for axis in ("tp", "dp")
    ]
    results = run_ranks(tmp_path, mesh(dp=2, tp=2), jobs, [0, 1, 2, 3])
    assert [[float(array[0]) for array in result] for result in results] == [
        [11, 101], [11, 1010], [1100, 101], [1100, 1010],
    ]  # fmt: skip


def test_a_missing_rank_is_a_dead_worker_within_the_timeout(tmp_path: Path) -> None:
    from lineshaft_contract.problems import CollectiveProblem

    operands = {rank: np.ones(2, np.float32) for rank in range(2)}
    problem = CollectiveProblem(dtype="float32", axis=("tp",), size=2, shape=(2,))
    failed = run_ranks(tmp_path, mesh(tp=2), [("all_reduce", problem, operands, ("tp",))], [0], timeout=1.0)
    assert "WorkerDied" in failed[0]


def test_an_axis_of_one_hands_its_input_back(tmp_path: Path) -> None:
    import torch

    group = ProcessGroups(World(), GLOO, 1.0).group("tp")
    x = torch.ones(3, 2)
    results = [
        group.all_reduce(x), group.all_gather(x, 0), group.reduce_scatter(x, 0), group.all_to_all(x, 0, 1),
        group.broadcast(x, 0), group.permute(x, 1),
    ]  # fmt: skip
    assert all(torch.equal(result, x) for result in results)


def test_a_dim_that_the_axis_does_not_divide_is_refused() -> None:
    import torch

    group = Group(("tp",), 0, 2, None)
    for call in (lambda: group.reduce_scatter(torch.ones(3, 2), 0), lambda: group.all_to_all(torch.ones(3, 2), 0, 1)):
        with pytest.raises(ContractViolation, match=r"the 2 members do not divide dim 0 of \[3, 2\]"):
            call()


def test_members_are_those_with_equal_other_coordinates() -> None:
    world = World(5, mesh(dp=2, cp=2, tp=2))
    assert members_of(world, ["cp"]) == [5, 7]
    assert members_of(world, ["cp", "tp"]) == [4, 5, 6, 7]
