"""The backend itself: what it can do, its memory, its kernels and its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lineshaft.contract.backends import Capabilities, World
from lineshaft.contract.kernels import Kernel
from lineshaft.contract.problems import KVProblem
from lineshaft_torch import TorchSession
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.session import SessionOptions
from lineshaft_toy.kernels import toy_kernels
from lineshaft_toy.options import ToyOptions

CAPABILITIES = Capabilities(dtypes=("float32", "bfloat16"), collectives=True)


class ToyMemory:
    """Implements `lineshaft.contract.sessions.Memory` for memory that nobody counts."""

    def total_free(self) -> tuple[int, int] | None:
        """None: unknown. The KV pool is then sized by what the scheduler can use."""
        return None

    def page_bytes(self, problem: KVProblem) -> int:
        return problem.page_bytes

    def synchronize(self) -> None:
        """Everything is done when it returns."""


@dataclass(frozen=True)
class ToyBackend:
    """Implements `lineshaft.contract.backends.Backend`."""

    options: ToyOptions
    world: World
    name: str = "toy"
    capabilities: Capabilities = CAPABILITIES
    memory: ToyMemory = field(default_factory=ToyMemory)

    def kernels(self) -> Sequence[Kernel]:
        """A portable kernel for every op, and this plugin's own."""
        return [*portable_kernels(self.name), *toy_kernels(self.name)]

    def session(self, rank: int) -> TorchSession:
        """A session on one device; name yours instead of "cpu"."""
        return TorchSession("cpu", replace(self.world, rank=rank), SessionOptions(program=self.options.program))


def create(options: ToyOptions, world: World) -> ToyBackend:
    """The factory that the plugin registers."""
    return ToyBackend(options, world)
