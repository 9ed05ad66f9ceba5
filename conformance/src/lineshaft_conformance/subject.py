"""The backend under test, as one process sees it: found by name, started with its options, asked for its kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lineshaft.config import validate_options
from lineshaft.contract.backends import Backend, BackendInfo, Capabilities, World
from lineshaft.contract.kernels import Kernel
from lineshaft.contract.ops import OpSpec, all_ops
from lineshaft.registry import Registry, discover, load_attribute

if TYPE_CHECKING:
    from lineshaft_conformance.mutants.mutant import Mutant


@dataclass(frozen=True)
class Target:
    """Which backend to test, as plain data: its name, its options, and the mutant to make of it ("" for none)."""

    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mutant: str = ""


class Subject:
    """A started backend. Everything it is asked goes through the public contract.

    Raises UnknownBackend, BackendUnavailable, InvalidValue, and whatever the plugin itself raises.
    """

    def __init__(self, target: Target, registry: Registry | None = None) -> None:
        self.target = target
        self.registry = registry or discover()
        self.info: BackendInfo = self.registry.select(target.backend, target.options)
        if target.mutant:
            self.info = self._mutant.info(self.info)
        self.ops: Mapping[str, OpSpec] = all_ops(self.registry.ops())
        self._kept: dict[Hashable, Any] = {}

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
