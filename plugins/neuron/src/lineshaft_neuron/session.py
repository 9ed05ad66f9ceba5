"""A session on Neuron cores, or on the stand-in for them: programs of static shape, compiled by one lane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lineshaft_contract.backends import World
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache, Capture, Memory, Transfer
from lineshaft_neuron.collectives import FunctionalGroups, SharedWorld
from lineshaft_neuron.lanes import Lane
from lineshaft_neuron.memory import Room
from lineshaft_neuron.pages import PageMover
from lineshaft_neuron.program import StaticProgram
from lineshaft_torch.arrays import HostArray
from lineshaft_torch.session import TorchSession


class NeuronSession(TorchSession):
    """Implements `lineshaft_contract.sessions.Session`; see there for what each method promises.

    Whatever computes is a compiled program, also what moves pages; between `freeze` and `thaw` nothing compiles.
    """

    def __init__(self, lane: Lane, world: World, shared: SharedWorld, memory: Memory) -> None:
        super().__init__(lane.device, world)
        self.lane, self.room, self._memory = lane, Room(memory), memory
        self.groups: Any = FunctionalGroups(world, shared, lane.device)
        self._mover = PageMover(lane, [])

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Without gradients, and outside of the inference mode, which the caller may be in: Dynamo tells its tensors
        from others, and would compile for both."""
        with torch.inference_mode(False), torch.no_grad():
            yield

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        made = super().alloc_caches(problems, pages, layout)
        self.room = Room(self._memory)  # programs over other caches do not run again
        with self.mode():
            self._mover = PageMover(self.lane, made)
        return made

    def read_pages(self, cache: int, ids: HostArray) -> dict[str, HostArray]:
        self.require_usable()
        with self.mode():
            return self._mover.read(cache, ids)

    def write_pages(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> Transfer:
        self.require_usable()
        with self.mode():
            self._mover.write(cache, ids, pages)
        return self._transfer()

    def copy_pages(self, group: int, src: HostArray, dst: HostArray) -> Transfer:
        self.require_usable()
        with self.mode():
            self._mover.copy(group, src, dst)
        return self._transfer()

    def _program(self, capture: Capture) -> StaticProgram:
        return StaticProgram(self, capture)

    def freeze(self) -> None:
        """Compile what moves pages too, and nothing from then on."""
        self.require_usable()
        with self.mode():
            self._mover.warm()
        self.lane.seal()
        super().freeze()

    def thaw(self) -> None:
        super().thaw()
        self.lane.unseal()

    def close(self) -> None:
        if not self.closed:
            self._mover = PageMover(self.lane, [])
            super().close()
            self.lane.close()
