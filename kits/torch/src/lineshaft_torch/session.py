"""A session on one torch device: owns weights, caches, programs and the arena that programs share.

Knows no model, no kernel and no vendor; the device, the mesh and the process-group library are given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch

from lineshaft_contract.backends import World
from lineshaft_contract.errors import ContractViolation, InvalidValue, MisshapenTensor, OutOfMemory
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import (
    Cache,
    Capture,
    DoneTransfer,
    Packing,
    PlannedOps,
    SessionState,
    StepFunction,
    Transfer,
    Tree,
    map_tree,
)
from lineshaft_contract.steps import ArraySpec, InputLayout, StepShape
from lineshaft_contract.weights import Checkpoint, Coordinate, Local, Param, Stored, Weight
from lineshaft_torch.arrays import HostArray, from_host, to_host
from lineshaft_torch.collectives import GLOO, ProcessGroups, Transport, coordinate_of
from lineshaft_torch.packing import dense_leaves, host_pack
from lineshaft_torch.pages import SLOTS_LAYOUT, cache_arrays, movable, page_view
from lineshaft_torch.program import EagerProgram, ProgramBase, StepPending, TapeProgram
from lineshaft_torch.recording import Recorder
from lineshaft_torch.staging import DirectStaging, Staging

Method = TypeVar("Method", bound=Callable[..., Any])


def without_gradients(method: Method) -> Method:
    """Run a session's method in its `mode`."""

    @wraps(method)
    def run(self: TorchSession, *args: Any, **kwargs: Any) -> Any:
        with self.mode():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs.

    program     "tape" replays what was recorded at capture; "eager" runs the forward anew each step; a device also has
                "graph" (steps without a prefill are one graph, others are "piecewise") and "piecewise" (graphs between
                the calls of attention, which are made anew)
    functional  write_kv leaves its cache untouched and returns a copy, so that a forward which ignores the result fails
    transport   what the ranks' process groups are made of
    timeout_s   how long to wait for the other ranks, in seconds
    overlap     a device's collectives run beside the calls that do not need their results
    staging     pinned buffers for the inputs of each program: so many steps may be on their way before the host waits
    """

    program: str = "tape"
    functional: bool = False
    transport: Transport = GLOO
    timeout_s: float = 300.0
    overlap: bool = False
    staging: int = 3


class TorchSession(SessionState):
    """Implements `lineshaft_contract.sessions.Session`; see there for what each method promises.

    All programs share one arena for intermediate results, which is as large as the largest of them needs.
    """

    def __init__(
        self, device: str | torch.device = "cpu", world: World | None = None, options: SessionOptions | None = None
    ) -> None:
        self.device = torch.device(device)
        self.world = world or World()
        self.options = options or SessionOptions()
        self.coordinate: Coordinate = coordinate_of(self.world)
        self.groups = ProcessGroups(self.world, self.options.transport, self.options.timeout_s, self.opaque)
        self.recorder: Recorder | None = None
        self.weights: Tree = {}
        self.caches: list[Cache] = []
        self.arena = self._bytes(0)
        self.generation = 0  # of weights and caches: what was captured over others must not run again
        self._params: dict[str, tuple[Param, Weight | torch.Tensor]] = {}
        self._shared: dict[tuple[Any, ...], tuple[Param, Packing, dict[str, torch.Tensor]]] = {}
        self._constants: dict[Hashable, Any] = {}

    def mode(self) -> AbstractContextManager[Any]:
        """In which the session computes: what it makes needs no gradients."""
        return torch.inference_mode()

    # ---- weights -----------------------------------------------------------------------------------------------

    @without_gradients
    def load(self, params: Tree, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Tree:
        """Weights of this rank's coordinate; a `const` Param becomes a bare tensor. Params of equal `source_id` and
        packing share memory. Raises MissingTensor, MisshapenTensor, OutOfMemory."""
        self.require_changeable("load")
        self._params, self._shared = {}, {}
        self.generation += 1
        self.weights = map_tree(lambda param: self._place(param, checkpoint, packings), params)
        return self.weights

    def _place(self, param: Param, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Weight | torch.Tensor:
        if param.name not in self._params:
            packing = packings.get(param.name, Packing())
            same = (param.source_id, packing.layout, param.shape, param.dtype)
            if same not in self._shared:
                with typed_memory(f"weight {param.name}"):
                    self._shared[same] = (param, packing, self._read(param, checkpoint, packing))
            made = self._make(param, len(self._params), packing, self._shared[same][2])
            self._params[param.name] = (param, made)
        return self._params[param.name][1]

    def _read(self, param: Param, checkpoint: Checkpoint, packing: Packing) -> dict[str, torch.Tensor]:
        """A parameter's leaves, from the checkpoint."""
        return self._leaves(param, param.shard(checkpoint, self.coordinate), packing)

    def _leaves(self, param: Param, local: Local, packing: Packing) -> dict[str, torch.Tensor]:
        if packing.pack is None:
            return {name: leaf.to(self.device) for name, leaf in dense_leaves(param, local).items()}
        return host_pack(packing.pack, param, local, self.device)

    @staticmethod
    def _make(param: Param, key: int, packing: Packing, arrays: dict[str, torch.Tensor]) -> Weight | torch.Tensor:
        if "const" in param.problems:
            return arrays["data"]
        return Weight(key, param.name, param.problems, packing.layout, arrays)

    @without_gradients
    def update(self, weights: Mapping[str, HostArray]) -> StepPending:
        """Raises MisshapenTensor for a name that was not loaded or another shape; then nothing has changed."""
        self.require_usable()
        made = [pair for name, array in weights.items() for pair in self._repack(name, array)]
        for old, new in made:
            for leaf, tensor in old.items():
                if tensor.is_mkldnn:  # opaque: it cannot be written to, and no tape holds it
                    old[leaf] = new[leaf]
                else:
                    tensor.copy_(new[leaf])
        return StepPending({}, {})

    def _repack(self, name: str, array: HostArray) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """The leaves held and the leaves to be held, of each packing of the parameter's source."""
        if name not in self._params:
            raise MisshapenTensor(f"update of {name!r}: no such parameter is loaded; load it first")
        source = self._params[name][0].source_id
        pairs = []
        for param, packing, leaves in self._shared.values():
            if param.source_id != source:
                continue
            if tuple(array.shape) != param.shape:
                raise MisshapenTensor(
                    f"update of {name!r}: shape {list(array.shape)}, not {list(param.shape)}; another shape needs load"
                )
            local = Local((Stored("none", param.shape, {"data": array}),))
            pairs.append((leaves, self._leaves(param, local, packing)))
        return pairs

    # ---- caches and pages --------------------------------------------------------------------------------------

    @without_gradients
    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        """Zeroed caches in the layout of this kit's kernels. Raises ContractViolation for another, OutOfMemory."""
        self.require_changeable("alloc_caches")
        if layout not in ("", SLOTS_LAYOUT):
            raise ContractViolation(f"cache layout {layout!r} is not known to this session; it has {SLOTS_LAYOUT!r}")
        self.generation += 1
        with typed_memory("the KV caches"):
            self.caches = [
                Cache(key, problem, SLOTS_LAYOUT, cache_arrays(problem, pages[problem.group], self.device))
                for key, problem in enumerate(problems)
            ]
        return list(self.caches)

    @without_gradients
    def read_pages(self, cache: int, ids: HostArray) -> dict[str, HostArray]:
        self.require_usable()
        rows = self._ids(ids)
        return {name: to_host(array.index_select(0, rows)) for name, array in page_view(self.caches[cache]).items()}

    @without_gradients
    def write_pages(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> Transfer:
        self.require_usable()
        rows = self._ids(ids)
        for name, array in page_view(self.caches[cache]).items():
            movable(array).index_copy_(0, rows, movable(self._sent(pages[name])))
        return self._transfer()

    @without_gradients
    def copy_pages(self, group: int, src: HostArray, dst: HostArray) -> Transfer:
        self.require_usable()
        source, target = self._ids(src), self._ids(dst)
        for cache in self.caches:
            if cache.problem.group == group:
                for array in map(movable, page_view(cache).values()):
                    array.index_copy_(0, target, array.index_select(0, source))
        return self._transfer()

    def _ids(self, ids: HostArray) -> torch.Tensor:
        return self._sent(np.asarray(ids, np.int64))

    def _sent(self, array: HostArray) -> torch.Tensor:
        """An array of the host as a tensor of the device; the array is free when this returns or not written to."""
        return from_host(array).to(self.device)

    def _transfer(self) -> Transfer:
        """The transfer that was just submitted."""
        return DoneTransfer()

    # ---- programs ----------------------------------------------------------------------------------------------

    @without_gradients
    def capture(
        self,
        fn: StepFunction,
        shape: StepShape,
        inputs: InputLayout,
        ops: PlannedOps,
        arrays: Mapping[str, ArraySpec] | None = None,
        host_outputs: frozenset[str] = frozenset(),
    ) -> ProgramBase:
        self.require_changeable("capture")
        capture = Capture(fn, shape, inputs, ops, dict(arrays or {}), host_outputs)
        with typed_memory(f"the results of a step of {shape.tokens} tokens"):
            return self._program(capture)

    def _program(self, capture: Capture) -> ProgramBase:
        kinds = {"tape": TapeProgram, "eager": EagerProgram}
        if self.options.program not in kinds:
            raise InvalidValue(f"program = {self.options.program!r}; without a device layer it is {' or '.join(kinds)}")
        return kinds[self.options.program](self, capture)

    def reserve_arena(self, nbytes: int) -> None:
        """Make the arena at least this large. Its storage grows in place, so that what earlier programs recorded still
        lies in it."""
        if nbytes > self.arena.numel():
            storage = self.arena.untyped_storage()
            with typed_memory("the arena of intermediate results"):
                storage.resize_(nbytes)
            self.arena = self._bytes(0).set_(storage, 0, (nbytes,), (1,))

    def tensors(self) -> list[torch.Tensor]:
        """Every weight and cache tensor that has addressable memory: what stays where it is from step to step."""
        weights = [leaf for *_, leaves in self._shared.values() for leaf in leaves.values() if not leaf.is_mkldnn]
        return weights + [leaf for cache in self.caches for leaf in cache.arrays.values()]

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Let every bound kernel of the session report to `recorder`."""
        self.recorder = recorder
        try:
            yield
        finally:
            self.recorder = None

    def constant(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once per session: tables and workspaces that bound kernels share."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def opaque(self, run: Callable[[], Any]) -> Any:
        """Run what computes by other means than torch's operators, such as a kernel of another compiler in its
        interpreter; a session over a fake device has to know of it."""
        return run()

    def staging(self, target: torch.Tensor) -> Staging:
        """The way of values that a kernel plans on the host, before each step, to its static workspace `target`."""
        return DirectStaging(target)

    def _bytes(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.weights, self.caches, self._params, self._shared = {}, [], {}, {}
            self._constants = {}
            self.arena = torch.empty(0, dtype=torch.uint8)
            self.groups.close()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a device."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in said or "out of memory" in said


@contextmanager
def typed_memory(what: str) -> Iterator[None]:
    """Turn an allocation failure into OutOfMemory; torch tells it from its other errors by its words alone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        raise OutOfMemory(
            f"no memory for {what} ({text}); use fewer pages, fewer tokens a step, a smaller model or a narrower dtype"
        ) from error
