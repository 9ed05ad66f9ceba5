"""A tiny planner for the kit's own tests: portable kernels bound by hand, and one thread for torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft.plan import Resolver
from lineshaft_contract.backends import World
from lineshaft_contract.problems import KVProblem, LinearProblem, NormProblem, PointwiseProblem, Problem
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_torch.device_session import DeviceSession
from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions, TorchSession


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class HandPlanned:
    """A PlannedOps: the portable kernel of each op under the problem given for it; `extra` are plain callables."""

    def __init__(self, problems: Mapping[str, Problem], extra: Mapping[str, Any] | None = None) -> None:
        self.problems, self.extra = problems, extra or {}
        self.prepared = 0

    def bind(self, session: Any) -> Any:
        resolver = Resolver("cpu", portable_kernels("cpu"), {})
        bound = {
            op: resolver.candidates(op, problem).best().bind(problem, session) for op, problem in self.problems.items()
        }
        return SimpleNamespace(**bound, **self.extra)

    def prepares(self, session: Any) -> list[Any]:
        def prepare(host: Any) -> None:
            self.prepared += 1

        return [prepare]


class KitTools:
    """What the tests of sessions and programs share."""

    HandPlanned = HandPlanned
    width = 8

    def session(self, **options: Any) -> TorchSession:
        return TorchSession("cpu", options=SessionOptions(**options))

    def on(self, device: FakeDevice, world: World | None = None) -> DeviceTools:
        """The same tools with sessions on a device."""
        return DeviceTools(device, world)

    def param(self, name: str, array: Any, *, source: str = "", kind: str = "linear", dtype: str = "float32") -> Param:
        values = np.asarray(array)
        stored = Stored("none", values.shape, {"data": values})
        problem = LinearProblem(dtype="float32", n=values.shape[0], k=values.shape[-1])
        return Param(
            name, source or name, values.shape, dtype, {kind: problem}, lambda checkpoint, at: Local((stored,))
        )

    def kv(self, **fields: Any) -> KVProblem:
        given = {"dtype": "float32", "kv_dtype": "float32", "kv_heads": 2, "qk_dim": 4, "v_dim": 4, "page_size": 4}
        return KVProblem(**{**given, **fields})

    def pointwise(self, *names: str, dtype: str = "float32") -> dict[str, Problem]:
        return {name: PointwiseProblem(dtype=dtype) for name in names}

    def norm(self) -> NormProblem:
        return NormProblem(dtype="float32", width=self.width, eps=1e-5)


class DeviceTools(KitTools):
    """Tools whose sessions are on a device."""

    def __init__(self, device: FakeDevice, world: World | None) -> None:
        self.device, self.world = device, world

    def session(self, **options: Any) -> DeviceSession:
        return DeviceSession(self.device, self.world, SessionOptions(**{"program": "graph", **options}))


@pytest.fixture
def kit() -> KitTools:
    return KitTools()
