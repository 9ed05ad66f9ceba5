"""Compiles ahead of time for one vendor's GPUs: the targets, and the problems of real models to compile for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lineshaft_contract.backends import Offered, World
from lineshaft_contract.errors import InvalidValue, LayoutError
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import Problem
from lineshaft_torch import one_shot
from lineshaft_torch.kernels import portable_kernels
from lineshaft_triton.ahead import COLUMNS, AheadBackend, Packed
from lineshaft_triton.backend import Libraries, capabilities_of, missing
from lineshaft_triton.compiling import Compiler, require_cache
from lineshaft_triton.priority import TRITON
from lineshaft_triton.real_problems import real_problems
from lineshaft_triton.targets import TARGETS, Target, targets_of

RANKS = 1024
"""More than any model's heads, experts and layers are spread over."""


@dataclass(frozen=True)
class TritonToolchain:
    """Implements `lineshaft_contract.backends.Toolchain` and `Catalogue` for the backend `name`, whose GPUs are of
    `vendor`. `chosen` is the target that the options name ("": the first), `libraries` what is called on GPUs alone."""

    name: str
    vendor: str
    compiler: Compiler = field(default_factory=Compiler)
    packed: Packed = field(default_factory=dict)
    chosen: str = ""
    libraries: Libraries = lambda target: ()

    def targets(self) -> Sequence[str]:
        return targets_of(self.vendor)

    def columns(self) -> Sequence[str]:
        return COLUMNS

    def problems(self, kernel: Kernel) -> Sequence[Problem]:
        """Of a step of an 8B Llama, of SmolLM2-135M and, for experts, of Mixtral 8x7B, by one of so many ranks."""
        return real_problems(kernel.op)

    def start(self, target: str, world: World) -> AheadBackend:
        where = self._find(target)
        if world.size > RANKS:
            degrees = " ".join(f"{axis}={degree}" for axis, degree in world.axes if degree > 1)
            raise LayoutError(f"layout {degrees} has {world.size} ranks; at most {RANKS} are held: lower a degree")
        require_cache()
        return self._on(where, world)

    def catalogue(self, target: str) -> Sequence[Offered]:
        where = self._find(target or self.chosen or self.targets()[0])
        beside = [(each, missing(module) or "on a GPU, not interpreted") for each, module in self.libraries(where)]
        beside += [(each, "among GPUs that read each other's memory") for each in one_shot.recipes(TRITON)]
        return [
            *map(Offered, portable_kernels(self.name)),
            *map(Offered, self._on(where, World()).kernels()),
            *(Offered(each(self.name), note) for each, note in beside),
        ]

    def _on(self, where: Target, world: World) -> AheadBackend:
        return AheadBackend(self.name, world, where, self.compiler, capabilities_of(where), self.packed)

    def _find(self, target: str) -> Target:
        if target not in self.targets():
            raise InvalidValue(f"target {target!r}: {self.name} compiles for {', '.join(self.targets())}")
        return TARGETS[target]
