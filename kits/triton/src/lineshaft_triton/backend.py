"""The backend that NVIDIA and AMD GPUs share: sessions on a device of the torch kit, with the kernels of this one.

Knows no vendor's library: what a plugin has beside is given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from lineshaft_contract.backends import Capabilities, DeterminismClaims, World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.sessions import Memory
from lineshaft_torch import one_shot
from lineshaft_torch.bound import DENSE, Recipe, recipe, stateless
from lineshaft_torch.collectives import GLOO, NCCL
from lineshaft_torch.device import DeviceLayer, LayerMemory
from lineshaft_torch.device_session import DeviceSession
from lineshaft_torch.fake import FakeDevice
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.kernels.linear import linear
from lineshaft_torch.session import SessionOptions
from lineshaft_triton.interpreted import InterpretedSession
from lineshaft_triton.options import GpuOptions
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

Libraries = Callable[[Target], Sequence[tuple[Recipe, str]]]
"""Kernels of a vendor's libraries and of other packages on a target, each with the module that it needs ("": torch)."""

DTYPES = ("bfloat16", "float16", "float32")
CAPABILITIES = Capabilities(
    dtypes=DTYPES, asynchronous=True, graphs=True, collectives=True, determinism=DeterminismClaims(run=True)
)


def capabilities_of(target: Target) -> Capabilities:
    """Pages may also hold floats of eight bits, in the one flavour that the target's matrix instructions read."""
    return replace(CAPABILITIES, kv_dtypes=(*DTYPES, target.fp8)) if target.fp8 else CAPABILITIES


@dataclass(frozen=True)
class GpuBackend:
    """Implements `lineshaft_contract.backends.Backend`.

    layer      the device, or fakes of one
    libraries  what else is registered for a real device, as far as it is installed
    """

    name: str
    options: GpuOptions
    world: World
    target: Target
    layer: DeviceLayer
    libraries: Libraries

    @property
    def real(self) -> bool:
        return not isinstance(self.layer, FakeDevice)

    @property
    def capabilities(self) -> Capabilities:
        """As of a device; but what runs the forward anew each step on a fake one is done when the call returns."""
        beside = self.real or self.options.program != "eager"
        return replace(capabilities_of(self.target), asynchronous=beside)

    @property
    def memory(self) -> Memory:
        return LayerMemory(self.layer)

    def kernels(self) -> Sequence[Kernel]:
        from lineshaft_triton.kernels import triton_kernels

        portable = portable_kernels(self.name, self.options.attention_memory_mib)
        beside = [*installed(self.libraries(self.target)), *self._one_shot()] if self.real else []
        return [*portable, *triton_kernels(self.name, self.target), *(recipe(self.name) for recipe in beside)]

    def _one_shot(self) -> list[Recipe]:
        """Sums of small messages, where there are several ranks whose devices can do them."""
        devices = self.options.devices or range(self.world.size)
        alone = self.world.size == 1 or one_shot.unavailable(devices[: self.world.size])
        return [] if alone else one_shot.recipes(TRITON)

    def session(self, rank: int) -> DeviceSession:
        options = SessionOptions(
            program=self.options.program, overlap=self.options.overlap_communication,
            transport=NCCL if self.real else GLOO,
        )  # fmt: skip
        make = DeviceSession if self.real else InterpretedSession
        return make(self.layer, replace(self.world, rank=rank), options)


def missing(module: str) -> str:
    """What to say of a module that is not installed, which is found without importing it; "" of one that is."""
    return f"{module} is not installed" if module and find_spec(module) is None else ""


def installed(kernels: Sequence[tuple[Recipe, str]]) -> list[Recipe]:
    """Those of `Libraries` whose modules are not missing."""
    return [each for each, module in kernels if not missing(module)]


def library_linear(name: str) -> Recipe:
    """Products by the vendor's own library, through torch: they are measured against this kit's."""
    return recipe(
        name, "linear", stateless(linear), out=True, layout=DENSE, priority=TRITON, tunable=True,
        handles=frozenset({"bias"}),
    )  # fmt: skip
