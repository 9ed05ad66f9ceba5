"""Compiles ahead of time for TPUs that are not here, and reads what the compiler tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lineshaft_contract.backends import World
from lineshaft_contract.errors import LayoutError
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem, Problem
from lineshaft_jax.ahead import AheadSession
from lineshaft_jax.memory import RankMemory
from lineshaft_jax.session import SessionOptions
from lineshaft_tpu.backend import TpuBackend
from lineshaft_tpu.chips import CHIPS, Topology, parse_topology
from lineshaft_tpu.devices import topology_devices
from lineshaft_tpu.inspection import COLUMNS, inspect
from lineshaft_tpu.options import TpuOptions
from lineshaft_tpu.pallas.interpreting import Mode
from lineshaft_tpu.tiling import LANES


@dataclass(frozen=True)
class AheadBackend(TpuBackend):
    """The backend on a topology that is not here."""

    @property
    def mode(self) -> Mode:
        return ""

    def session(self, rank: int) -> AheadSession:
        return AheadSession(self.world, self.devices, SessionOptions(self.lanes, self.store), inspect)


@dataclass(frozen=True)
class TpuToolchain:
    """Implements `lineshaft_contract.backends.Toolchain`."""

    options: TpuOptions

    def targets(self) -> Sequence[str]:
        return tuple(CHIPS)

    def columns(self) -> Sequence[str]:
        return COLUMNS

    def problems(self, kernel: Kernel) -> Sequence[Problem]:
        """Of a step of an 8B model: whole, and one of eight ranks' shares."""
        return [problem for op, problem in eight_b() if op == kernel.op and kernel.supports(problem) is None]

    def start(self, target: str, world: World) -> AheadBackend:
        topology = parse_topology(target, world.size)
        if world.size > topology.devices:
            raise LayoutError(too_small(topology, world))
        devices = topology_devices(topology)
        memory = RankMemory(lambda: (topology.chip.hbm, topology.chip.hbm), LANES)
        return AheadBackend(self.options, world, devices, topology.chip, memory, store=None)


def too_small(topology: Topology, world: World) -> str:
    degrees = " ".join(f"{axis}={degree}" for axis, degree in world.axes if degree > 1)
    return (
        f"layout {degrees} has {world.size} ranks; topology {topology.name} has {topology.devices} devices, one each: "
        "lower a degree or name a larger topology"
    )


def eight_b() -> Iterator[tuple[str, Problem]]:
    """Problems of a model with 32 query and 8 key heads of 128, hidden 4096 and width 14336: decode of 64 rows of up to
    8192 tokens, and a chunk of 512 tokens."""
    for share, tokens, rows, longest in ((1, 64, 64, 1), (8, 64, 64, 1), (1, 512, 8, 512), (8, 512, 8, 512)):
        heads: dict[str, Any] = {"kv_heads": 8 // share, "qk_dim": 128, "v_dim": 128}
        heads |= {"page_size": 32, "kv_dtype": "bfloat16"}
        yield "write_kv", KVProblem(dtype="bfloat16", rows=tokens, **heads)
        yield "attend", AttendProblem(
            dtype="bfloat16", q_heads=32 // share, scale=128**-0.5, tokens=tokens, rows=rows, pages=256,
            max_query=longest, **heads,
        )  # fmt: skip
        for scheme in ("none", "int8", "fp8"):
            yield "linear", LinearProblem(dtype="bfloat16", m=tokens, n=28672 // share, k=4096, scheme=scheme)
            yield "linear", LinearProblem(dtype="bfloat16", m=tokens, n=4096, k=14336 // share, scheme=scheme)


def create(options: TpuOptions) -> TpuToolchain:
    """The toolchain that the plugin registers."""
    return TpuToolchain(options)
