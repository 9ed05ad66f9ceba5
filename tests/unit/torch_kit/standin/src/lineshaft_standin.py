"""A backend on the torch kit's fake device: portable kernels, in graphs, on streams that no hardware runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lineshaft_contract.backends import BackendInfo, BackendKind, Capabilities, DeterminismClaims, Probe, World
from lineshaft_contract.hooks import hookimpl
from lineshaft_contract.kernels import Kernel


class Options(BaseModel):
    """`lazy` names the streams whose work waits until it is needed; `budget` bounds the device's memory, in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    program: Literal["graph", "piecewise", "tape", "eager"] = "graph"
    overlap: bool = False
    lazy: str = "main side"
    budget: int | None = None


CAPABILITIES = Capabilities(
    dtypes=("float32", "bfloat16"), asynchronous=True, graphs=True, collectives=True,
    determinism=DeterminismClaims(run=True),
)  # fmt: skip


class Devices:
    """The fake devices of a backend's sessions, as its Memory."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def total_free(self) -> tuple[int, int] | None:
        return None

    def page_bytes(self, problem: Any) -> int:
        return problem.page_bytes

    def synchronize(self) -> None:
        for device in self.made:
            device.synchronize()


@dataclass(frozen=True)
class Backend:
    options: Options
    world: World
    name: str = "standin"
    capabilities: Capabilities = CAPABILITIES
    memory: Devices = field(default_factory=Devices)

    def kernels(self) -> Sequence[Kernel]:
        from lineshaft_torch.kernels import portable_kernels

        return portable_kernels(self.name)

    def session(self, rank: int) -> Any:
        from lineshaft_torch.device_session import DeviceSession
        from lineshaft_torch.fake import FakeDevice
        from lineshaft_torch.session import SessionOptions

        device = FakeDevice(self.options.lazy.split(), self.options.budget)
        self.memory.made = [device]
        options = SessionOptions(program=self.options.program, overlap=self.options.overlap, timeout_s=30.0)
        return DeviceSession(device, replace(self.world, rank=rank), options)


def probe() -> Probe:
    return Probe(True, "always there")


def create(options: Options, world: World) -> Backend:
    return Backend(options, world)


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            "standin", "lineshaft_standin:probe", "lineshaft_standin:create", "lineshaft_standin:Options",
            kind=BackendKind.REFERENCE, summary="the torch kit's fake device",
        )
    ]  # fmt: skip
