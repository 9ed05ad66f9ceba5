"""The all-reduce of small messages: its limit, when it is there, and its sums, over memory of the host that stands in
for that of several devices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft_contract.backends import World
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.problems import CollectiveProblem
from lineshaft_torch import one_shot
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions, TorchSession

SPEC = all_ops()["all_reduce"]


def problem(shape: tuple[int, ...], size: int = 2, dtype: str = "bfloat16") -> CollectiveProblem:
    return CollectiveProblem(dtype=dtype, axis=("tp",), size=size, shape=shape)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (problem((16, 4096)), None),
        (problem((17, 4096)), "at most 256 KiB in float32, not of 272"),
        (problem((1, 1), size=9), "at most 8 ranks, not 9"),
        (problem((1, 1), dtype="float64"), "too narrow for float64"),
    ],
)
def test_the_size_of_the_message_decides(given: CollectiveProblem, reason: str | None) -> None:
    found = one_shot.supports(given)
    assert found == reason if reason is None else reason in str(found)


def test_it_is_there_where_devices_read_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    assert one_shot.unavailable([0, 1]) == ""
    assert one_shot.unavailable([0, 1, 2]) == "device 0 cannot read the memory of device 2"
    monkeypatch.setattr(one_shot, "NEEDED", ("no_such_operator",))
    assert "has no no_such_operator" in one_shot.unavailable([0, 1])


def test_the_operator_has_the_signature_that_is_used() -> None:
    schema = str(torch.ops.symm_mem.one_shot_all_reduce_out.default._schema)
    assert schema.endswith(
        "one_shot_all_reduce_out(Tensor input, str reduce_op, str group_name, Tensor(a!) out) -> Tensor(a!)"
    )


class HostShared:
    """Memory of the host, summed by the group's own transport."""

    def __init__(self, group: Any) -> None:
        self.part, self._group = torch.full((one_shot.LIMIT // 4,), torch.nan), group

    def add_up(self, part: torch.Tensor, out: torch.Tensor) -> None:
        assert part.dtype == out.dtype == torch.float32 and part.is_contiguous()
        assert part.data_ptr() == self.part.data_ptr()
        out.copy_(self._group.all_reduce(part))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_are_those_of_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(one_shot, "share", lambda problem, session: HostShared(session.groups.group(problem.axis)))
    cases = [case for case in SPEC.cases(np.random.default_rng(3), "smoke") if case.problem.axis == ("tp",)]
    cases = [case for case in cases if case.problem.size == 2 and case.problem.dtype == dtype]
    assert cases
    axes = (("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 2))

    def rank(number: int) -> list[Any]:
        session = TorchSession("cpu", World(number, axes, str(tmp_path / "store")), SessionOptions(timeout_s=30))
        (kernel,) = [recipe("any") for recipe in one_shot.recipes(20)]
        results = []
        for case in cases:
            x = from_host(operand(case.args[0], case.problem)[number])
            results.append(to_host(kernel.bind(case.problem, session)(x, "tp")))
        session.close()
        return results

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    for case, members in zip(cases, zip(first, second, strict=True), strict=True):
        assert not compare(SPEC, case, list(members))


def test_members_of_other_axes_and_purposes_meet_elsewhere(tmp_path: Path) -> None:
    axes = (("dp", 2), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 2))
    sessions = [TorchSession("cpu", World(rank, axes, str(tmp_path / "store"))) for rank in range(4)]
    names = [session.groups.meeting("tp", "one-shot")[1] for session in sessions]
    assert names[0] == names[1] != names[2] == names[3]
    assert sessions[0].groups.meeting("tp")[1] not in names
    assert sessions[0].groups.meeting(("dp", "tp"), "one-shot")[1] not in names


def test_it_outranks_the_transport() -> None:
    (kernel,) = [recipe("any") for recipe in one_shot.recipes(20)]
    (other,) = [made for made in portable_kernels("any") if made.op == "all_reduce"]
    assert kernel.priority > other.priority


def test_one_rank_registers_none() -> None:
    from lineshaft_cuda.options import CudaOptions
    from lineshaft_triton.backend import GpuBackend
    from lineshaft_triton.targets import TARGETS

    backend = GpuBackend("cuda", CudaOptions(), World(), TARGETS["sm90"], SimpleNamespace(), lambda target: [])  # type: ignore[arg-type]
    assert backend._one_shot() == []
