"""A session of the native engine: owns weights, caches, programs, the arena that they share, and a team of threads."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np

from lineshaft_contract.errors import ContractViolation, MisshapenTensor
from lineshaft_contract.ops.spec import HostArray
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
    leaves,
    map_tree,
)
from lineshaft_contract.steps import ArraySpec, InputLayout, StepShape
from lineshaft_contract.weights import Checkpoint, Coordinate, Local, Param, Stored, Weight
from lineshaft_cpu.engine.arrays import FOREIGN, Buffer, TapeArray
from lineshaft_cpu.engine.caches import LAYOUTS, CacheLayout
from lineshaft_cpu.engine.checks import Paging, check_pages, within
from lineshaft_cpu.engine.memory import Region, helpers, pages, touch, typed_memory
from lineshaft_cpu.engine.program import NativePending, NativeProgram
from lineshaft_cpu.engine.stored import dense
from lineshaft_cpu.engine.tape import Tape
from lineshaft_cpu.engine.team import Team
from lineshaft_cpu.native import Native


class NativeSession(SessionState):
    """Implements `lineshaft_contract.sessions.Session`; see there for what each method promises."""

    def __init__(self, native: Native, threads: int) -> None:
        """Raises OutOfMemory where the system gives fewer threads."""
        self.native = native
        self.lock = threading.RLock()  # one call at a time
        self.weights: Tree = {}
        self.caches: list[Cache] = []
        self.paging: dict[int, Paging] = {}  # of each cache group
        self.generation = 0  # of weights and caches: what was captured over others must not run again
        self._tape: Tape | None = None
        self._params: dict[str, tuple[Param, Weight | TapeArray]] = {}
        self._shared: dict[Hashable, tuple[Param, Packing, dict[str, HostArray]]] = {}
        self._constants: dict[Hashable, Any] = {}
        self.memory = Region()  # of inputs and outputs of programs: many of them are small, and huge pages are not
        with typed_memory("a session"):
            self._arena, self._scratch = pages(0), pages(0)
        self._coordinate = Coordinate()
        self._under_way: tuple[NativePending, float] | None = None  # and the seconds that it took before its last part
        self.team = Team(native, threads)
        end_in_time(self)

    def submitted(self, pending: NativePending, seconds: float) -> None:
        """The last part of a step is under way; the ones before took so many seconds."""
        self._under_way = pending, seconds

    def finish(self) -> None:
        """Wait for the step under way, if there is one."""
        with self.lock:
            if self._under_way is not None:
                pending, seconds = self._under_way
                pending.ended(seconds + self.team.wait())
                self._under_way = None  # last, so that an interrupt loses nothing

    # ---- weights -----------------------------------------------------------------------------------------------

    def load(self, params: Tree, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Tree:
        """A `const` Param becomes a bare array. Params of equal `source_id` and packing share memory. Raises
        MissingTensor, MisshapenTensor, OutOfMemory."""
        self.require_changeable("load")
        self.finish()
        self.weights, self._params, self._shared = {}, {}, {}
        self.generation += 1
        region = Region()
        wanted: dict[Hashable, tuple[Param, Packing]] = {}
        for param in leaves(params):
            packing = packings.get(param.name, Packing())
            wanted.setdefault(identity(param, packing), (param, packing))

        def read(pair: tuple[Param, Packing]) -> dict[str, HostArray]:
            param, packing = pair
            local = param.shard(checkpoint, self._coordinate)
            with typed_memory(f"weight {param.name}"), region.filling():
                return {name: region.keep(leaf) for name, leaf in self._packed(param, local, packing).items()}

        largest = sorted(wanted, key=lambda same: -prod(wanted[same][0].shape))  # first, so that none is left for last
        with helpers(self.team.threads) as pool:
            found = dict(zip(largest, pool.map(read, [wanted[same] for same in largest]), strict=True))
        self._shared = {same: (*pair, found[same]) for same, pair in wanted.items()}
        self.weights = map_tree(lambda param: self._place(param, packings.get(param.name, Packing())), params)
        return self.weights

    def _place(self, param: Param, packing: Packing) -> Weight | TapeArray:
        if param.name not in self._params:
            made = self._make(param, packing, self._shared[identity(param, packing)][2])
            self._params[param.name] = param, made
        return self._params[param.name][1]

    def _packed(self, param: Param, local: Local, packing: Packing) -> dict[str, HostArray]:
        """A parameter's leaves: as the packing makes them, or dense in checkpoint order."""
        return packing.pack(param, local) if packing.pack else {"data": dense(self.native.library, param, local)}

    def _make(self, param: Param, packing: Packing, leaves: dict[str, HostArray]) -> Weight | TapeArray:
        if "const" in param.problems:
            data = leaves["data"]
            return TapeArray(Buffer(data.nbytes, data), data.shape, param.dtype)
        return Weight(len(self._params), param.name, param.problems, packing.layout, leaves)

    def update(self, weights: Mapping[str, HostArray]) -> NativePending:
        """Raises MisshapenTensor for a name that was not loaded or another shape; then nothing has changed."""
        self.require_usable()
        made = [pair for name, array in weights.items() for pair in self._repacked(name, array)]
        with self.lock:
            self.finish()
            for old, new in made:
                for name, leaf in old.items():
                    leaf[...] = new[name]
        return NativePending(None)

    def _repacked(self, name: str, array: HostArray) -> list[tuple[dict[str, HostArray], dict[str, HostArray]]]:
        """The leaves held and the leaves to be held, of each packing of the parameter's source."""
        if name not in self._params:
            raise MisshapenTensor(f"update of {name!r}: no such parameter is loaded; load it first")
        source = self._params[name][0].source_id
        pairs = []
        for param, packing, held in self._shared.values():
            if param.source_id != source:
                continue
            if tuple(array.shape) != param.shape:
                raise MisshapenTensor(
                    f"update of {name!r}: shape {list(array.shape)}, not {list(param.shape)}; another shape needs load"
                )
            local = Local((Stored("none", param.shape, {"data": array}),))
            pairs.append((held, self._packed(param, local, packing)))
        return pairs

    # ---- caches and pages --------------------------------------------------------------------------------------

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        """Zeroed caches in a layout of this engine's kernels. Raises ContractViolation for another, OutOfMemory."""
        self.require_changeable("alloc_caches")
        self.finish()
        layout = layout or next(iter(LAYOUTS))
        if layout not in LAYOUTS:
            raise ContractViolation(
                f"cache layout {layout!r} is not known to this session; it has {', '.join(LAYOUTS)}"
            )
        self.generation += 1
        self.caches, region = [], Region()
        with typed_memory("the KV caches"):
            self.caches = [
                Cache(key, problem, layout, LAYOUTS[layout].arrays(problem, pages[problem.group], region))
                for key, problem in enumerate(problems)
            ]
            touch((array for cache in self.caches for array in cache.arrays.values()), self.team.threads)
        self.paging = {problem.group: Paging(pages[problem.group], problem.page_size) for problem in problems}
        return list(self.caches)

    def read_pages(self, cache: int, ids: HostArray) -> dict[str, HostArray]:
        self.require_usable()
        found = self._ids(self._cache(cache).problem.group, ids)
        with self.lock:
            self.finish()
            return self._layout(cache).read(self.caches[cache], found)

    def write_pages(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> DoneTransfer:
        self.require_usable()
        problem = self._cache(cache).problem
        assert isinstance(problem, KVProblem)
        found = self._ids(problem.group, ids)
        check_pages(problem, len(found), pages)
        with self.lock:
            self.finish()
            self._layout(cache).write(self.caches[cache], found, pages)
        return DoneTransfer()

    def copy_pages(self, group: int, src: HostArray, dst: HostArray) -> DoneTransfer:
        self.require_usable()
        source, target = self._ids(group, src), self._ids(group, dst)
        if source.shape != target.shape:
            raise ContractViolation(f"copy_pages of {len(source)} pages to {len(target)}; give as many of both")
        with self.lock:
            self.finish()
            for cache in self.caches:
                if cache.problem.group == group:
                    self._layout(cache.key).copy(cache, source, target)
        return DoneTransfer()

    def _ids(self, group: int, ids: HostArray) -> HostArray:
        """Page ids as int64. Raises ContractViolation for one that the group has not."""
        if group not in self.paging:
            raise ContractViolation(f"cache group {group}: allocated are {', '.join(map(str, self.paging)) or 'none'}")
        found = np.asarray(ids)
        if found.size and found.dtype.kind not in "iu":
            raise ContractViolation(f"page ids of group {group} are {found.dtype.name}; integers are needed")
        found = found.astype(np.int64)
        within(f"page ids of group {group}", found, self.paging[group].pages)
        return found

    def _cache(self, cache: int) -> Cache:
        """Raises ContractViolation for one that was not allocated."""
        if not 0 <= cache < len(self.caches):
            raise ContractViolation(f"cache {cache}: {len(self.caches)} are allocated, from 0 on")
        return self.caches[cache]

    def _layout(self, cache: int) -> CacheLayout:
        return LAYOUTS[self.caches[cache].layout]

    # ---- programs ----------------------------------------------------------------------------------------------

    def capture(
        self,
        fn: StepFunction,
        shape: StepShape,
        inputs: InputLayout,
        ops: PlannedOps,
        arrays: Mapping[str, ArraySpec] | None = None,
        host_outputs: frozenset[str] = frozenset(),
    ) -> NativeProgram:
        self.require_changeable("capture")
        self.finish()
        capture = Capture(fn, shape, inputs, ops, dict(arrays or {}), host_outputs)
        with typed_memory(f"the results of a step of {shape.tokens} tokens"):
            return NativeProgram(self, capture)

    @contextmanager
    def recording(self, tape: Tape) -> Iterator[None]:
        """Let every bound kernel of the session record its calls on `tape`. Raises ContractViolation for a kernel of
        another engine."""
        self._tape = tape
        try:
            yield
        except (AttributeError, TypeError) as error:
            raise ContractViolation(
                f"the forward or a kernel that it calls fails on arrays of the native engine: {error}; {FOREIGN}"
            ) from error
        finally:
            self._tape = None

    @property
    def tape(self) -> Tape:
        """The tape that is being recorded. Raises ContractViolation for a kernel that is called at another time."""
        if self._tape is None:
            raise ContractViolation("a kernel of the native engine was called outside of a capture; call its program")
        return self._tape

    def reserve_arena(self, nbytes: int) -> HostArray:
        """Memory of at least so many bytes that programs share; those of before keep what they were given."""
        if nbytes > self._arena.nbytes:
            self._arena = pages(nbytes)
        return self._arena

    def reserve_scratch(self, nbytes: int) -> HostArray:
        """Memory of so many bytes for each thread, which programs share in the same way."""
        if nbytes * self.team.threads > self._scratch.nbytes:
            self._scratch = pages(nbytes * self.team.threads)
        return self._scratch

    def constant(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once per session: tables that bound kernels share."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def close(self) -> None:
        with self.lock:
            if not self.closed:
                self.finish()
                self.closed = True
                self.team.close()
                self.weights, self.caches, self._params, self._shared = {}, [], {}, {}
                self._constants = {}
                self._arena = self._scratch = np.empty(0, np.uint8)


def identity(param: Param, packing: Packing) -> Hashable:
    """What parameters have in common that share memory."""
    return param.source_id, packing.layout, param.shape, param.dtype


def end_in_time(session: NativeSession) -> None:
    """Let the interpreter wait for a step under way before it takes the session's memory away, at its own exit and
    when nobody holds the session any more; then end the team."""
    held = weakref.ref(session)

    def close() -> None:
        if (found := held()) is not None:
            found.close()

    def forget(team: Team) -> None:
        atexit.unregister(close)
        team.close()

    atexit.register(close)
    weakref.finalize(session, forget, session.team).atexit = False  # it would come before `close`, and instead of it
