"""The rocm backend: sessions of the torch kit, with the kernels of the Triton kit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lineshaft_contract.backends import Capabilities, DeterminismClaims, World
from lineshaft_contract.errors import BackendUnavailable
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.sessions import UncountedMemory
from lineshaft_rocm.options import RocmOptions
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions, TorchSession
from lineshaft_triton.interpreting import require_mode
from lineshaft_triton.targets import TARGETS

CAPABILITIES = Capabilities(
    dtypes=("bfloat16", "float16", "float32"), collectives=True, determinism=DeterminismClaims(run=True)
)


@dataclass(frozen=True)
class RocmBackend:
    """Implements `lineshaft_contract.backends.Backend`."""

    options: RocmOptions
    world: World
    name: str = "rocm"
    capabilities: Capabilities = CAPABILITIES
    memory: UncountedMemory = field(default_factory=UncountedMemory)

    def kernels(self) -> Sequence[Kernel]:
        from lineshaft_triton.kernels import triton_kernels

        portable = portable_kernels(self.name, self.options.attention_memory_mib)
        return [*portable, *triton_kernels(self.name, TARGETS[self.options.target])]

    def session(self, rank: int) -> TorchSession:
        return TorchSession("cpu", replace(self.world, rank=rank), SessionOptions())


def create(options: RocmOptions, world: World) -> RocmBackend:
    """The factory that the plugin registers."""
    if not options.interpret:
        raise BackendUnavailable("no GPU is driven yet; set interpret = true under [backend_options]")
    require_mode(interpret=True)
    return RocmBackend(options, world)
