"""Compiles ahead of time for one vendor's GPUs: the targets, and the problems of real models to compile for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lineshaft_contract.backends import World
from lineshaft_contract.errors import InvalidValue, LayoutError
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import Problem
from lineshaft_triton.ahead import COLUMNS, AheadBackend, Packed
from lineshaft_triton.backend import capabilities_of
from lineshaft_triton.compiling import Compiler, require_cache
from lineshaft_triton.real_problems import real_problems
from lineshaft_triton.targets import TARGETS, targets_of

RANKS = 1024
"""More than any model's heads, experts and layers are spread over."""


@dataclass(frozen=True)
class TritonToolchain:
    """Implements `lineshaft_contract.backends.Toolchain` for the backend `name`, whose GPUs are of `vendor`."""

    name: str
    vendor: str
    compiler: Compiler = field(default_factory=Compiler)
    packed: Packed = field(default_factory=dict)

    def targets(self) -> Sequence[str]:
        return targets_of(self.vendor)

    def columns(self) -> Sequence[str]:
        return COLUMNS

    def problems(self, kernel: Kernel) -> Sequence[Problem]:
        """Of a step of an 8B Llama, of SmolLM2-135M and, for experts, of Mixtral 8x7B, by one of so many ranks."""
        return real_problems(kernel.op)

    def start(self, target: str, world: World) -> AheadBackend:
        if target not in self.targets():
            raise InvalidValue(f"target {target!r}: {self.name} compiles for {', '.join(self.targets())}")
        if world.size > RANKS:
            degrees = " ".join(f"{axis}={degree}" for axis, degree in world.axes if degree > 1)
            raise LayoutError(f"layout {degrees} has {world.size} ranks; at most {RANKS} are held: lower a degree")
        require_cache()
        where = TARGETS[target]
        return AheadBackend(self.name, world, where, self.compiler, capabilities_of(where), self.packed)
