"""A session on a mesh of devices: owns weights, caches and programs, and runs all of its ranks in one program.

Knows no model, no kernel and no vendor; the devices and the place of compiled programs are given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from lineshaft_contract.backends import World
from lineshaft_contract.errors import ContractViolation, OutOfMemory
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import (
    Cache,
    Capture,
    DoneTransfer,
    Packing,
    PlannedOps,
    SessionState,
    StepFunction,
    Tree,
)
from lineshaft_contract.steps import ArraySpec, InputLayout, StepShape
from lineshaft_contract.weights import Checkpoint, Param
from lineshaft_jax.arrays import HostArray
from lineshaft_jax.kernels.pages import LAYOUT, cache_specs
from lineshaft_jax.mesh import Placement, coordinates_of, mesh_of
from lineshaft_jax.packing import host_leaves
from lineshaft_jax.program import InFlight, JaxProgram, StepPending
from lineshaft_jax.store import ProgramStore
from lineshaft_jax.transfers import PageMover
from lineshaft_jax.weights import Weights


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs.

    lanes   the head dim of pages is padded to a multiple of this
    store   where compiled programs are kept from one start to the next (None: nowhere)
    flight  where steps are noted as long as they run
    """

    lanes: int = 1
    store: ProgramStore | None = None
    flight: InFlight = field(default_factory=InFlight)


class JaxSession(SessionState):
    """Implements `lineshaft_contract.sessions.Session`; see there for what each method promises.

    `devices` are those of all ranks of the world, in their order; the session takes its worker's own.
    """

    def __init__(self, world: World, devices: Sequence[Any], options: SessionOptions | None = None) -> None:
        self.world, self.options = world, options or SessionOptions()
        self.flight = self.options.flight
        self.placement = Placement(mesh_of(world, devices))
        self.weights = Weights()
        self.caches: list[Cache] = []
        self.generation = 0  # of weights and caches: what was captured over others must not run again
        self.compiled = 0  # programs that a compiler made, not the store
        self._movers: dict[Any, PageMover] = {}

    @property
    def ranks(self) -> int:
        return self.placement.ranks

    # ---- weights -----------------------------------------------------------------------------------------------

    def load(self, params: Tree, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Tree:
        """Weights of every rank's coordinate; a `const` Param becomes a bare array. Raises MissingTensor,
        MisshapenTensor, OutOfMemory."""
        self.require_changeable("load")
        self.generation += 1
        self.weights = Weights()
        self.weights.load(params, packings, partial(self.place, checkpoint))
        return self.weights.dressed(self.weights.arrays)

    def place(self, checkpoint: Checkpoint, param: Param, packing: Packing) -> Mapping[str, Any]:
        """The leaves of a parameter, from each rank's share of it, on their devices."""
        coordinates = coordinates_of(self.world)
        with memory(f"weight {param.name}"):
            places = coordinates if param.varies else coordinates[:1]
            shares = [host_leaves(param, param.shard(checkpoint, at), packing) for at in places]
            return self._put(shares, own=bool(param.varies))

    def _put(self, shares: Sequence[Mapping[str, HostArray]], *, own: bool) -> dict[str, Any]:
        names = list(shares[0])
        if own:
            return {name: self.placement.put_own([share[name] for share in shares]) for name in names}
        return {name: self.placement.put(shares[0][name]) for name in names}

    def update(self, weights: Mapping[str, HostArray]) -> StepPending:
        """Raises MisshapenTensor for an unknown name or another shape, OutOfMemory; then nothing has changed."""
        self.require_usable()
        found = [pair for name, values in weights.items() for pair in self.weights.repacked(name, values, self.ranks)]
        with memory("the updated weights"):
            made = [(source, self._put(shares, own=bool(source.param.varies))) for source, shares in found]
        for source, arrays in made:
            for name, index in source.leaves.items():
                self.weights.arrays[index] = arrays[name]
        return StepPending(self, {})

    # ---- caches and pages --------------------------------------------------------------------------------------

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        """Zeroed caches in the layout of this kit's kernels. Raises ContractViolation for another, OutOfMemory."""
        self.require_changeable("alloc_caches")
        if layout not in ("", LAYOUT):
            raise ContractViolation(f"cache layout {layout!r} is not known to this session; it has {LAYOUT!r}")
        self.generation += 1
        self._movers = {}
        with memory("the KV caches"):
            self.caches = [
                Cache(key, problem, LAYOUT, self._pages(problem, pages[problem.group]))
                for key, problem in enumerate(problems)
            ]
        return list(self.caches)

    def _pages(self, problem: KVProblem, pages: int) -> dict[str, Any]:
        specs = cache_specs(problem, pages, self.options.lanes)
        return {name: self.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of zeros on each rank."""
        return self.placement.zeros(shape, dtype)

    def mover(self, cache: Cache) -> PageMover:
        """What moves pages of caches like this one."""
        assert isinstance(cache.problem, KVProblem)
        if cache.problem not in self._movers:
            pages = len(next(iter(cache.arrays.values()))) // self.ranks
            self._movers[cache.problem] = PageMover(self.placement, cache.problem, pages)
        return self._movers[cache.problem]

    def read_pages(self, cache: int, ids: HostArray) -> dict[str, HostArray]:
        self.require_usable()
        held = self.caches[cache]
        return self.mover(held).read(held.arrays, ids)

    def write_pages(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> DoneTransfer:
        self.require_usable()
        held = self.caches[cache]
        with self.poison_on_failure():
            held.arrays.update(self.mover(held).write(held.arrays, ids, pages))
        return DoneTransfer()

    def copy_pages(self, group: int, src: HostArray, dst: HostArray) -> DoneTransfer:
        self.require_usable()
        with self.poison_on_failure():
            for cache in self.caches:
                if cache.problem.group == group:
                    cache.arrays.update(self.mover(cache).copy(cache.arrays, src, dst))
        return DoneTransfer()

    # ---- programs ----------------------------------------------------------------------------------------------

    def capture(
        self,
        fn: StepFunction,
        shape: StepShape,
        inputs: InputLayout,
        ops: PlannedOps,
        arrays: Mapping[str, ArraySpec] | None = None,
        host_outputs: frozenset[str] = frozenset(),
    ) -> JaxProgram:
        self.require_changeable("capture")
        with memory(f"the program of a step of {shape.tokens} tokens"):
            return self.make_program(Capture(fn, shape, inputs, ops, dict(arrays or {}), host_outputs))

    def make_program(self, capture: Capture) -> JaxProgram:
        """A program that has run once."""
        program = JaxProgram(self, capture)
        program.run_empty()
        return program

    def executable(self, program: JaxProgram) -> tuple[Any, bool]:
        """The compiled program, and whether it came from the store."""
        arguments, store = program.arguments(), self.options.store
        if store is None:
            return self.compile(program, arguments), False
        key = store.key(self._identity(program, arguments))
        found = store.load(key, list(self.placement.mesh.devices.flat), program.adopt)
        if found is not None:
            return found, True
        compiled = self.compile(program, arguments)
        store.save(key, compiled, list(program.changes))
        return compiled, False

    def compile(self, program: JaxProgram, arguments: tuple[Any, ...]) -> Any:
        """Trace, lower and compile."""
        self.compiled += 1
        own = (False, self.weights.own, True, True)
        jitted = self.placement.program(program.body, own, donate=(2,))
        return jitted.lower(*arguments).compile()

    def _identity(self, program: JaxProgram, arguments: tuple[Any, ...]) -> list[Any]:
        """All that a program is made from, beside the facts of the store."""
        mesh, capture = self.placement.mesh, program.capture
        shapes = [(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(arguments)]
        problems = [repr(cache.problem) for cache in self.caches]
        devices = [device.id for device in mesh.devices.flat]
        return [
            capture.ops.digest, capture.inputs.fields, sorted(capture.arrays.items()), shapes, problems,
            self.weights.places(), self.weights.own, mesh.devices.shape, devices,
        ]  # fmt: skip

    def inspect(self, text: Callable[[], str]) -> Mapping[str, str | int]:
        """What else is to be told of a program (`CaptureReport.details`); `text` gives what it was compiled to."""
        return {}

    def freeze(self) -> None:
        """Also runs each transfer of pages once, on the null page, so that none compiles later."""
        super().freeze()
        with self.poison_on_failure():
            for cache in {cache.problem: cache for cache in self.caches}.values():
                cache.arrays.update(self.mover(cache).warm(cache.arrays))

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.weights, self.caches, self._movers = Weights(), [], {}


@contextmanager
def memory(what: str) -> Iterator[None]:
    """Turn a failed allocation into OutOfMemory; XLA tells it from its other errors by a status alone."""
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory(what, error) from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _out_of_memory(what, error) from error


def _out_of_memory(what: str, error: BaseException) -> OutOfMemory:
    text = " ".join(str(error).split())
    return OutOfMemory(
        f"no memory for {what} ({text:.400}); use fewer pages, fewer tokens a step, a larger tp, a smaller model or a "
        "narrower dtype"
    )
