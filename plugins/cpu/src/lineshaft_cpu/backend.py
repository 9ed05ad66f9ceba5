"""The CPU backend: sessions of the torch kit on the host, with kernels made for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lineshaft_contract.backends import Capabilities, DeterminismClaims, World
from lineshaft_contract.host import fair_share
from lineshaft_contract.kernels import Kernel
from lineshaft_cpu import native
from lineshaft_cpu.kernels import cpu_kernels
from lineshaft_cpu.options import CpuOptions
from lineshaft_torch.host_memory import HostMemory
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions, TorchSession

CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float32", "float64"),
    collectives=True,
    determinism=DeterminismClaims(run=True),
)


@dataclass(frozen=True)
class CpuBackend:
    """Implements `lineshaft_contract.backends.Backend`."""

    options: CpuOptions
    world: World
    name: str = "cpu"
    capabilities: Capabilities = CAPABILITIES
    memory: HostMemory = field(default_factory=HostMemory)

    def kernels(self) -> Sequence[Kernel]:
        return [
            *portable_kernels(self.name, self.options.attention_memory_mib),
            *cpu_kernels(self.name, self.options.native),
        ]

    def session(self, rank: int) -> TorchSession:
        """A session for `rank`; sets the threads of this process's torch."""
        torch.set_num_threads(self.world.threads or fair_share(self.world.size))
        options = SessionOptions(program=self.options.program, functional=self.options.functional)
        return TorchSession("cpu", replace(self.world, rank=rank), options)


def create(options: CpuOptions, world: World) -> CpuBackend:
    """The factory that the plugin registers. Raises Unsupported for a level of native kernels that cannot run here: one
    that was named is never replaced by another."""
    if options.native not in ("auto", "off"):
        native.load(options.native)
    return CpuBackend(options, world)
