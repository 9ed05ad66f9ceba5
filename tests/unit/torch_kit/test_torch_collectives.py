"""Collectives among spawned processes: three ranks on one axis, four on 2 x 2 with subgroups, and a missing rank."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft.errors import ContractViolation, Unsupported
from lineshaft_contract.backends import World
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.run import compare, operand
from lineshaft_torch import collectives
from lineshaft_torch.collectives import GLOO, NCCL, Group, ProcessGroups, members_of

TIMEOUT_S = 60
OPS = {name: spec for name, spec in all_ops().items() if spec.collective}

WORKER = """
import pickle, sys
import torch
from lineshaft_contract.backends import World
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_torch.collectives import Transport, gloo_group
from lineshaft_torch.device_session import DeviceSession
from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions, TorchSession

rank, folder, timeout, kind = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
axes, jobs = pickle.load(open(folder + "/jobs", "rb"))
world = World(rank, axes, rendezvous=folder + "/store")
if kind == "device":
    options = SessionOptions("graph", transport=Transport("gloo", gloo_group, own_dtype=True), timeout_s=timeout)
    session = DeviceSession(FakeDevice(), world, options)
else:
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


def run_ranks(
    folder: Path, axes: Any, jobs: Any, ranks: list[int], timeout: float = TIMEOUT_S, kind: str = "host"
) -> list[Any]:
    (folder / "jobs").write_bytes(pickle.dumps((axes, jobs)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(folder), str(timeout), kind], env=environment, stderr=subprocess.PIPE
        )
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
    ("degrees", "places", "kind"),
    [
        ({"tp": 3}, {("tp",): [[0, 1, 2]]}, "host"),
        ({"dp": 2, "tp": 2}, {("tp",): [[0, 1], [2, 3]], ("dp", "tp"): [[0, 1, 2, 3]]}, "host"),
        ({"tp": 3}, {("tp",): [[0, 1, 2]]}, "device"),
    ],
    ids=["tp3", "dp2xtp2", "device"],
)
def test_collectives_agree_with_their_references(tmp_path: Path, degrees: Any, places: Any, kind: str) -> None:
    axes = mesh(**degrees)
    ranks = list(range(np.prod(list(degrees.values()))))
    jobs, checks = jobs_over(axes, places)
    assert {op for op, *_ in jobs} == set(OPS)
    results = run_ranks(tmp_path, axes, jobs, ranks, kind=kind)
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
    group = ProcessGroups(World(), GLOO, 1.0).group("tp")
    x = torch.ones(3, 2)
    results = [
        group.all_reduce(x), group.all_gather(x, 0), group.reduce_scatter(x, 0), group.all_to_all(x, 0, 1),
        group.broadcast(x, 0), group.permute(x, 1),
    ]  # fmt: skip
    assert all(torch.equal(result, x) for result in results)


def test_a_dim_that_the_axis_does_not_divide_is_refused() -> None:
    group = Group(("tp",), 0, 2, None)
    for call in (lambda: group.reduce_scatter(torch.ones(3, 2), 0), lambda: group.all_to_all(torch.ones(3, 2), 0, 1)):
        with pytest.raises(ContractViolation, match=r"the 2 members do not divide dim 0 of \[3, 2\]"):
            call()


def test_members_are_those_with_equal_other_coordinates() -> None:
    world = World(5, mesh(dp=2, cp=2, tp=2))
    assert members_of(world, ["cp"]) == [5, 7]
    assert members_of(world, ["cp", "tp"]) == [4, 5, 6, 7]


class Transporting:
    """One end of a group of three, that adds nothing up; notes the dtypes that it is given."""

    def __init__(self) -> None:
        self.given: list[torch.dtype] = []

    def wait(self) -> None:
        """Done."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Transporting:
        self.given.append(tensors[0].dtype)
        return self

    def _reduce_scatter_base(self, out: torch.Tensor, tiles: torch.Tensor) -> Transporting:
        self.given.append(tiles.dtype)
        out.copy_(tiles[: out.numel()])
        return self


@pytest.mark.parametrize(("own", "given"), [(False, [torch.float32] * 2), (True, [torch.bfloat16] * 2)])
def test_sums_are_made_in_the_dtype_that_the_transport_asks_for(own: bool, given: list[torch.dtype]) -> None:
    backend, x = Transporting(), torch.arange(12, dtype=torch.bfloat16).view(2, 6)
    group = Group(("tp",), 0, 3, backend, own_dtype=own)
    assert group.all_reduce(x).dtype == torch.bfloat16
    assert torch.equal(group.reduce_scatter(x, 1), x[:, :2])
    assert backend.given == given


LOST = """
import os, sys
from types import SimpleNamespace
import numpy as np
from lineshaft_contract.backends import World
from lineshaft_contract.errors import SessionPoisoned, WorkerDied
from lineshaft_contract.problems import CollectiveProblem
from lineshaft_contract.steps import HostStep, InputField, InputLayout, StepShape
from lineshaft_torch.device_session import DeviceSession
from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions

rank, folder = int(sys.argv[1]), sys.argv[2]
axes = (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 2))
session = DeviceSession(FakeDevice(), World(rank, axes, rendezvous=folder + "/store"), SessionOptions(program="graph"))
problem = CollectiveProblem(dtype="float32", axis=("tp",), size=2, shape=(2,))
kernel = next(kernel for kernel in portable_kernels("x") if kernel.op == "all_reduce")
ops = SimpleNamespace(
    bind=lambda session: SimpleNamespace(all_reduce=kernel.bind(problem, session)), prepares=lambda session: []
)
inputs = InputLayout([InputField("x", "float32", (2,))])

def fn(ops, weights, caches, step, arrays):
    return {"y": ops.all_reduce(step.arrays["x"], "tp")}, caches

program = session.capture(fn, StepShape(2, 2, (), 2, 1), inputs, ops, {}, frozenset({"y"}))
session.freeze()
host = HostStep(inputs)
host["x"][:] = rank + 1
assert program(host).result("y").tolist() == [3.0, 3.0]
if rank == 1:
    os._exit(0)
pending = program(host)
try:
    pending.result("y")
except WorkerDied as error:
    print(error)
try:
    program(host)
except SessionPoisoned as error:
    print("poisoned")
session.close()
"""


def test_a_peer_that_is_lost_is_told_to_whoever_reads_a_graphs_result(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    one, other = (
        subprocess.Popen(
            [sys.executable, "-c", LOST, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    )  # fmt: skip
    try:
        said, errors = one.communicate(timeout=TIMEOUT_S)
    finally:
        one.kill()
        other.kill()
        other.communicate()
    assert one.returncode == 0, errors.decode()
    assert "all_reduce over tp: another worker ended" in said.decode() and "poisoned" in said.decode()


def test_a_transport_that_torch_lacks_is_missed_when_it_is_asked_for(monkeypatch) -> None:
    monkeypatch.delattr(collectives.dist, "ProcessGroupNCCL", raising=False)
    with pytest.raises(Unsupported, match="without NCCL"):
        NCCL.connect(None, 0, 2, timedelta(seconds=1))


def test_groups_of_devices_watch_for_longer_than_the_session_waits(monkeypatch) -> None:
    made: list[Any] = []

    class ProcessGroupNCCL:
        class Options:
            _timeout = timedelta(seconds=600)

        def __init__(self, store: Any, index: int, members: int, options: Any) -> None:
            made.append((store, index, members, options._timeout))

    monkeypatch.setattr(collectives.dist, "ProcessGroupNCCL", ProcessGroupNCCL, raising=False)
    NCCL.connect("store", 1, 4, timedelta(seconds=5))
    assert made == [("store", 1, 4, timedelta(seconds=10))] and NCCL.own_dtype and not GLOO.own_dtype
