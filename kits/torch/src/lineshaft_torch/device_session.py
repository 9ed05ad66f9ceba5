"""A session on a device behind a layer: steps and pages are submitted to its main stream, and waited for when read.

Knows no vendor and no kernel; the layer, the mesh and the transport are given to it.
"""

from __future__ import annotations

import time
import traceback
import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from lineshaft_contract.backends import World
from lineshaft_contract.errors import InvalidValue, LineshaftError, OutOfMemory, WorkerDied
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache, Capture, Packing, PlannedOps, StepFunction, Transfer, Tree
from lineshaft_contract.steps import ArraySpec, InputLayout, StepShape
from lineshaft_contract.weights import Checkpoint
from lineshaft_torch.arrays import HostArray, from_host, host_view, to_host
from lineshaft_torch.device import DeviceLayer, Event, Pool
from lineshaft_torch.graphs import AnewProgram, EventTransfer, GraphProgram
from lineshaft_torch.program import ProgramBase, StepPending
from lineshaft_torch.session import SessionOptions, TorchSession
from lineshaft_torch.staging import PinnedStaging, Staging

PROGRAMS = {"graph": GraphProgram, "piecewise": GraphProgram, "tape": GraphProgram, "eager": AnewProgram}
PAUSE_S = 2e-5
"""Between two looks at an event that other ranks may keep from passing."""


class DeviceSession(TorchSession):
    """Implements `lineshaft_contract.sessions.Session` on the device of `layer`; see there for what it promises.

    All programs share one pool for what their graphs allocate, as they share one arena.
    """

    def __init__(self, layer: DeviceLayer, world: World | None = None, options: SessionOptions | None = None) -> None:
        self.layer = layer
        options = options or SessionOptions(program="graph")
        if options.program not in PROGRAMS:
            raise InvalidValue(f"program = {options.program!r}; on a device it is one of {', '.join(PROGRAMS)}")
        if options.overlap and options.program == "eager":
            raise InvalidValue('overlap = true needs recorded calls; with program = "eager" there are none')
        with layer.on(layer.main):
            super().__init__(layer.device, world, options)
        self._pool: Pool = None
        self._captured: list[weakref.ref[Any]] = []

    # ---- weights, caches and pages -----------------------------------------------------------------------------

    def load(self, params: Tree, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Tree:
        with self.layer.on(self.layer.main):
            return super().load(params, checkpoint, packings)

    def update(self, weights: Mapping[str, HostArray]) -> StepPending:
        with self.layer.on(self.layer.main):
            return super().update(weights)

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        """See TorchSession. OutOfMemory says how many pages of each group would fit."""
        self.require_changeable("alloc_caches")
        with self.layer.on(self.layer.main):
            self.caches, self.generation = [], self.generation + 1
            asked = self._room(problems, pages)
            if asked > self._free():
                raise self._too_much(problems, pages)
            try:
                return super().alloc_caches(problems, pages, layout)
            except OutOfMemory as error:
                for failed in (error, error.__cause__):  # what was allocated before the failure lives in their frames
                    traceback.clear_frames(failed.__traceback__ if failed else None)
                raise self._too_much(problems, pages) from error

    def _free(self) -> int:
        self.layer.release()
        return self.layer.memory()[1]

    def _room(self, problems: Sequence[KVProblem], pages: Sequence[int]) -> int:
        """Bytes that the device has to give for caches."""
        granule = self.layer.granule
        return sum(
            -(-pages[problem.group] * ArraySpec(tuple(shape), dtype).nbytes // granule) * granule
            for problem in problems
            for shape, dtype in problem.page_arrays.values()
        )

    def _too_much(self, problems: Sequence[KVProblem], pages: Sequence[int]) -> OutOfMemory:
        """What was asked, and the largest share of it that fits."""
        free, most = self._free(), max(pages, default=0)

        def shared(count: int) -> list[int]:
            return [n * count // most for n in pages]

        fits = bisect_right(range(1, most + 1), free, key=lambda count: self._room(problems, shared(count)))
        return OutOfMemory(
            f"no memory for the KV caches: {list(pages)} pages (by group) take {self._room(problems, pages)} bytes and "
            f"{free} are free, in which {shared(fits)} pages would fit; set cache.pages accordingly, free memory of "
            "the device, or use a narrower dtype"
        )

    def read_pages(self, cache: int, ids: HostArray) -> dict[str, HostArray]:
        self.require_usable()
        with self.layer.on(self.layer.main):
            self.reach(self.layer.record())
            return super().read_pages(cache, ids)

    def write_pages(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> Transfer:
        with self.layer.on(self.layer.main):
            return super().write_pages(cache, ids, pages)

    def copy_pages(self, group: int, src: HostArray, dst: HostArray) -> Transfer:
        with self.layer.on(self.layer.main):
            return super().copy_pages(group, src, dst)

    def _sent(self, array: HostArray) -> torch.Tensor:
        source = from_host(array)  # its shape and dtype
        pinned, made = self.layer.pinned(source), torch.empty_like(source, device=self.device)
        np.copyto(host_view(pinned), array)
        self.layer.copy(made, pinned)
        return made

    def _transfer(self) -> Transfer:
        return EventTransfer(self, self.layer.record())

    # ---- programs ----------------------------------------------------------------------------------------------

    def capture(
        self,
        fn: StepFunction,
        shape: StepShape,
        inputs: InputLayout,
        ops: PlannedOps,
        arrays: Mapping[str, ArraySpec] | None = None,
        host_outputs: frozenset[str] = frozenset(),
    ) -> ProgramBase:
        with self.layer.on(self.layer.main):
            return super().capture(fn, shape, inputs, ops, arrays, host_outputs)

    def _program(self, capture: Capture) -> ProgramBase:
        made = PROGRAMS[self.options.program](self, capture)
        self._captured.append(weakref.ref(made))
        made.make_ready()
        return made

    def _programs(self) -> list[Any]:
        return [program for ref in self._captured if (program := ref()) is not None]

    def graph_pool(self) -> Pool:
        """The pool of all programs' graphs: a new one while there are none, since it goes with the last of them."""
        if not any(program.holds_graphs() for program in self._programs()):
            self._pool = self.layer.pool()
        return self._pool

    def freeze(self) -> None:
        """Capture again what the arena has moved away from, the largest program first: later ones reuse its memory."""
        self.require_usable()
        for program in sorted(self._programs(), key=lambda program: -program.shape.tokens):
            program.make_ready()
        super().freeze()

    def opaque(self, run: Any) -> Any:
        return self.layer.opaque(run)

    def staging(self, target: torch.Tensor) -> Staging:
        return PinnedStaging(self.layer, target, self.options.staging, self.reach)

    # ---- waiting -----------------------------------------------------------------------------------------------

    def reach(self, event: Event) -> None:
        """Wait until the device has passed `event`. A failure poisons the session; WorkerDied is raised when other
        ranks keep the device from it for longer than `timeout_s`."""
        if self.closed:
            return
        with self.poison_on_failure():
            if self.world.size == 1:
                event.synchronize()
            else:
                self._await(event)

    def _await(self, event: Event) -> None:
        deadline = time.monotonic() + self.options.timeout_s
        while not event.query():
            if time.monotonic() > deadline:
                self.groups.abort()
                raise WorkerDied(
                    f"a step has waited {self.options.timeout_s:g} s for other workers: one of them ended or does not "
                    "answer; restart the run"
                )
            time.sleep(PAUSE_S)

    def settle(self) -> None:
        """Wait for all that was submitted. Raises as `reach` does."""
        for stream in (self.layer.side, self.layer.main):
            with self.layer.on(stream):
                self.reach(self.layer.record())

    def fetch(self, tensor: torch.Tensor) -> HostArray:
        """A private host copy of a tensor as it is after all that was submitted."""
        self.require_usable()
        with self.layer.on(self.layer.main), torch.inference_mode():
            self.reach(self.layer.record())
            return to_host(tensor)

    def close(self) -> None:
        if self.closed:
            return
        with suppress(RuntimeError, LineshaftError):  # whoever reads a result of a failed device is told
            if self._failure is None:
                self.settle()
            else:
                self.groups.abort()
        for program in self._programs():
            program.release()
        super().close()
        self.layer.release()
