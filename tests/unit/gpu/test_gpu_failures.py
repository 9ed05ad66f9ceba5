"""What must fail, and how: over the fake device and gloo, which show nothing of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft.errors import ContractViolation, OutOfMemory, Unsupported
from lineshaft.plan import Resolver
from lineshaft_conformance.harness.op_case import prepare
from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.problems import AttendProblem, KVProblem
from lineshaft_cuda import backend as cuda
from lineshaft_cuda.options import CudaOptions
from lineshaft_torch.bound import recipe
from lineshaft_torch.fake import FakeDevice
from lineshaft_triton import backend as shared
from lineshaft_triton.backend import GpuBackend, installed
from lineshaft_triton.targets import TARGETS

OPS = all_ops()


def backend(layer: FakeDevice | None = None, **options: Any) -> GpuBackend:
    given = CudaOptions(interpret=True, **options)
    return GpuBackend("cuda", given, World(threads=1), TARGETS["sm90"], layer or FakeDevice(), cuda.libraries)


# ---- problems that no kernel takes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"qk_dim": 80, "v_dim": 80}, "heads of 64, 128, 256"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "not in float32"),
        ({"window": 9}, "does not handle window"),
    ],
)
def test_a_kernel_that_was_named_runs_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(shared, "find_spec", lambda name: object())
    kernels = [recipe("cuda") for recipe in installed(cuda.libraries(TARGETS["sm90"]))]
    given: dict[str, Any] = {
        "dtype": "bfloat16", "kv_dtype": "bfloat16", "q_heads": 4, "kv_heads": 2, "qk_dim": 64, "v_dim": 64,
        "page_size": 16, "scale": 1.0,
    }  # fmt: skip
    resolver = Resolver("cuda", kernels, {"attend": "flashinfer_attend"})
    with pytest.raises(Unsupported, match=reason):
        resolver.candidates("attend", AttendProblem(**{**given, **fields})).best()
    paged = Resolver("cuda", kernels, {"attend": "flash_attend"})
    with pytest.raises(Unsupported, match=r"pages of a multiple of 256 tokens, not of 16 \(cache.page_size\)"):
        paged.candidates("attend", AttendProblem(**given)).best()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_no_memory_for_pages_says_how_many_would_fit() -> None:
    problem = KVProblem(dtype="float32", kv_dtype="float32", kv_heads=2, qk_dim=64, v_dim=64, page_size=16)
    session = backend(FakeDevice(budget=100 * problem.page_bytes)).session(0)
    with pytest.raises(OutOfMemory, match=r"\[400\] pages.* in which \[(9\d|100)\] pages would fit; set cache.pages"):
        session.alloc_caches([problem] * 1, [400], "slots")
    session.alloc_caches([problem], [90], "slots")
    session.close()


def test_pages_that_the_host_of_the_interpreter_does_not_have_are_refused() -> None:
    problem = KVProblem(dtype="float32", kv_dtype="float32", kv_heads=2, qk_dim=64, v_dim=64, page_size=16)
    session = backend(FakeDevice()).session(0)
    with pytest.raises(OutOfMemory, match=r"\[1000000000\] pages.* would fit"):
        session.alloc_caches([problem], [10**9], "slots")
    session.close()


# ---- graphs ----------------------------------------------------------------------------------------------------------


def peeking(name: str, capturable: bool = True) -> Kernel:
    """An add that reads a value on the host."""

    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if x.abs().sum().item() >= 0 else y

    made = recipe(name, "add", lambda problem, session: add, capturable=lambda problem: capturable)
    return made("cuda")


def add_case() -> Any:
    cases = OPS["add"].cases(np.random.default_rng(0), "smoke")
    return prepare(OPS["add"], next(case for case in cases if case.problem.dtype == "float32"))


def subject(**options: Any) -> Any:
    return SimpleNamespace(info=SimpleNamespace(name="cuda"), ops=OPS, backend=backend(**options))


def test_what_cannot_be_captured_is_named_with_its_operator() -> None:
    with pytest.raises(ContractViolation, match=r"kernel 'peeking' for add.*aten.item.*program = \"tape\""):
        add_case().rig(subject(program="graph"), [peeking("peeking")])


@pytest.mark.parametrize(("program", "capturable"), [("tape", True), ("eager", True), ("graph", False)])
def test_it_runs_where_it_is_not_captured(program: str, capturable: bool) -> None:
    case = add_case()
    with case.rig(subject(program=program), [peeking("peeking", capturable)]) as rig:
        assert case.run(rig).result


# ---- peers -----------------------------------------------------------------------------------------------------------

RANK = """
import os, sys, time
from types import SimpleNamespace
import numpy as np, torch
from lineshaft.errors import WorkerDied
from lineshaft_contract.backends import World
from lineshaft_contract.problems import CollectiveProblem
from lineshaft_contract.steps import HostStep, InputField, InputLayout, StepShape
from lineshaft_cuda.options import CudaOptions
from lineshaft_torch.collectives import GLOO
from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions
from lineshaft_triton.interpreted import InterpretedSession

rank, folder, program, overlap = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True"
torch.set_num_threads(1)
axes = (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 3))
world = World(rank, axes, rendezvous=folder + "/store")
session = InterpretedSession(FakeDevice(), world, SessionOptions(program, overlap=overlap, timeout_s=4.0))
problem = CollectiveProblem(dtype="float32", axis=("tp",), size=3, shape=(8,))
(kernel,) = [kernel for kernel in portable_kernels("cuda") if kernel.op == "all_reduce"]

class Ops:
    digest, outputs = "", {}
    def bind(self, session): return SimpleNamespace(all_reduce=kernel.bind(problem, session))
    def prepares(self, session): return []

inputs = InputLayout([InputField("x", "float32", (8,))])
shape = StepShape(tokens=1, rows=1, pages=(), logits=1, max_query=1)
fn = lambda ops, weights, caches, step, arrays: ({"y": ops.all_reduce(step.arrays["x"], "tp")}, caches)
session.load([], None, {})
program = session.capture(fn, shape, inputs, Ops(), {}, frozenset({"y"}))
session.freeze()
host = HostStep(inputs)
for n in range(20):
    host["x"][:] = n + rank
    began = time.monotonic()
    try:
        got = program(host).result("y")
    except WorkerDied as error:
        print("WorkerDied", round(time.monotonic() - began, 1), error)
        sys.stdout.flush()
        os._exit(0)
    assert got[0] == 3 * n + 3, got
    if n == 5 and rank == 2:
        os._exit(1)
print("never noticed")
"""


@pytest.mark.parametrize(("program", "overlap"), [("graph", True), ("eager", False)])
def test_every_rank_is_told_in_time_that_a_peer_is_lost(tmp_path: Path, program: str, overlap: bool) -> None:
    """Over gloo: three ranks, the last of which ends after some steps."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    began = time.monotonic()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    commands = [[*command, str(rank), str(tmp_path), program, str(overlap)] for rank in range(3)]
    ranks = [subprocess.Popen(each, **pipes) for each in commands]
    try:
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[2].returncode == 1
    for out, err in said[:2]:
        assert out.startswith("WorkerDied"), (out, err)
        assert float(out.split()[1]) < 10
    assert time.monotonic() - began < 60
