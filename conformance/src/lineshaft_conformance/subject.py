"""The backend under test, as one process sees it: found by name, started with its options, asked for its kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lineshaft.config import validate_options
from lineshaft.errors import InvalidValue
from lineshaft.registry import Registry, discover, load_attribute
from lineshaft_conformance.ahead import make_toolchain
from lineshaft_contract.backends import Backend, BackendInfo, Capabilities, Catalogue, Offered, Toolchain, World
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import OpSpec, all_ops

if TYPE_CHECKING:
    from lineshaft_conformance.mutants.mutant import Mutant


@dataclass(frozen=True)
class Target:
    """Which backend to test, as plain data: its name, its options, and the mutant to make of it ("" for none).

    ahead: as its toolchain starts it, which needs no device.
    """

    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mutant: str = ""
    ahead: bool = False


class Subject:
    """A started backend. Everything it is asked goes through the public contract.

    Raises UnknownBackend, BackendUnavailable, InvalidValue, and whatever the plugin itself raises.
    """

    def __init__(self, target: Target, registry: Registry | None = None) -> None:
        self.target = target
        self.registry = registry or discover()
        self.info: BackendInfo = self._choose()
        if target.mutant:
            self.info = self._mutant.info(self.info)
        self.ops: Mapping[str, OpSpec] = all_ops(self.registry.ops())
        self._kept: dict[Hashable, Any] = {}

    def _choose(self) -> BackendInfo:
        return self.registry.select(self.target.backend, self.target.options)

    @cached_property
    def toolchain(self) -> Toolchain:
        """Compiles ahead of time. Raises InvalidValue where the backend has none."""
        return make_toolchain(self.info, self.target.options, self.registry)

    def on(self, device: str) -> OnDevice:
        """The backend as its toolchain starts it for a device, with this subject's toolchain."""
        made: OnDevice = self.keep(("on", device), lambda: OnDevice(self.target, self.registry, device, self.toolchain))
        return made

    @cached_property
    def backend(self) -> Backend:
        """The backend at world size 1, with one thread: checks run side by side in several processes."""
        return self.start(World(threads=1))

    def start(self, world: World) -> Backend:
        """A backend of its own at another place in a mesh."""
        options = validate_options(self.info, self.target.options)
        made: Backend = load_attribute(self.info.factory)(options, world)
        return self._mutant.make(made) if self.target.mutant else made

    @property
    def _mutant(self) -> Mutant:
        from lineshaft_conformance.mutants import gallery

        return gallery()[self.target.mutant]

    @property
    def capabilities(self) -> Capabilities:
        return self.backend.capabilities

    @cached_property
    def kernels(self) -> Sequence[Kernel]:
        """The backend's own kernels and those that plugins contribute to it."""
        return self.kernels_of(self.backend)

    def kernels_of(self, backend: Backend) -> Sequence[Kernel]:
        """The same for a backend at another place."""
        return [*backend.kernels(), *self.registry.kernels(self.info.name)]

    @property
    def main_dtype(self) -> str:
        """The dtype of checks that run in one alone: float32 where the backend executes it, else what it prefers."""
        dtypes = self.capabilities.dtypes
        return "float32" if "float32" in dtypes else dtypes[0]

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when `key` was asked for first: dear things that checks share. `close` closes them."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def close(self) -> None:
        """Idempotent: close what was kept, latest first."""
        while self._kept:
            _, made = self._kept.popitem()
            if hasattr(made, "close"):
                made.close()


class OnDevice(Subject):
    """The backend as its toolchain starts it for a device that is not here: it compiles, and runs nothing.

    device      one of the toolchain's targets ("": the first of them)
    toolchain   to share one (default: one of its own)

    Raises as Subject does, but for BackendUnavailable, and InvalidValue for a backend without toolchain or targets.
    """

    def __init__(
        self, target: Target, registry: Registry | None = None, device: str = "", toolchain: Toolchain | None = None
    ) -> None:
        super().__init__(target, registry)
        if toolchain is not None:
            self.toolchain = toolchain
        self.device = device or next(iter(self.toolchain.targets()), "")
        if not self.device:
            raise InvalidValue(f"the toolchain of backend {target.backend!r} lists no target; update its plugin")

    def _choose(self) -> BackendInfo:
        return self.registry.named(self.target.backend)

    def start(self, world: World) -> Backend:
        return self.toolchain.start(self.device, world)


def offered(target: Target, device: str = "") -> Sequence[Offered]:
    """Every kernel that a backend can register on a device that is not here ("": as its options have it, or the first);
    those of a backend without toolchain are what it registers here. Raises as OnDevice and Subject do."""
    registry = discover()
    info = registry.named(target.backend)
    if not (info.toolchain or device):
        return [*map(Offered, Subject(target, registry).kernels)]
    toolchain = make_toolchain(info, target.options, registry)
    if isinstance(toolchain, Catalogue):
        return [*toolchain.catalogue(device), *map(Offered, registry.kernels(info.name))]
    return [*map(Offered, OnDevice(target, registry, device, toolchain).kernels)]


def make_subject(target: Target, registry: Registry | None = None) -> Subject:
    """The subject that the target asks for."""
    return OnDevice(target, registry) if target.ahead else Subject(target, registry)
