"""The backend and its sessions: weights and caches are changed in place, programs run their function each step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lineshaft_contract import sessions
from lineshaft_contract.backends import Capabilities, World
from lineshaft_contract.errors import InvalidValue, MisshapenTensor, OutOfMemory
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.schemes import dequantize
from lineshaft_contract.sessions import Cache, DoneTransfer, Packing, Tree
from lineshaft_contract.steps import ArraySpec, HostStep, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Checkpoint, Coordinate, Local, Param, Stored, Weight
from lineshaft_plainnp.kernels import Array, plain_kernels
from lineshaft_plainnp.plugin import Options


class Plain:
    """The backend. Raises InvalidValue for more than one worker."""

    name, memory, capabilities = "plainnp", sessions.UncountedMemory(), Capabilities(dtypes=("float32",))

    def __init__(self, options: Options, world: World) -> None:
        if world.size > 1:
            raise InvalidValue(f"backend 'plainnp' runs one worker, given are {world.size}; set every degree to 1")
        self.options = options

    def kernels(self) -> Sequence[Kernel]:
        return plain_kernels(self.name, self.options.query_block)

    def session(self, rank: int) -> "PlainSession":
        return PlainSession()


class PlainSession(sessions.SessionState):
    """See `lineshaft_contract.sessions.Session` for what each method promises."""

    def __init__(self) -> None:
        self.weights: Tree = {}
        self.caches: list[Cache] = []
        self._sources: dict[str, str] = {}  # of parameters, by name
        self._leaves: dict[Any, tuple[Param, Packing, dict[str, Array]]] = {}  # one of each source and packing

    def load(self, params: Tree, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Tree:
        self.require_changeable("load")
        self._sources, self._leaves = {}, {}
        keys: dict[str, int] = {}

        def place(param: Param) -> Weight | Array:
            packing = packings.get(param.name, Packing())
            same = (param.source_id, packing.layout, param.shape, param.dtype)
            if same not in self._leaves:
                self._leaves[same] = param, packing, packed(param, param.shard(checkpoint, Coordinate()), packing)
            self._sources[param.name], arrays = param.source_id, self._leaves[same][2]
            key = keys.setdefault(param.name, len(keys))
            weight = Weight(key, param.name, param.problems, packing.layout, arrays)
            return arrays["data"] if "const" in param.problems else weight

        self.weights = sessions.map_tree(place, params)
        return self.weights

    def update(self, weights: Mapping[str, Array]) -> "Finished":
        self.require_usable()
        if unknown := weights.keys() - self._sources.keys():
            raise MisshapenTensor(f"update of {sorted(unknown)}: no such parameters are loaded; load them first")
        stored = {self._sources[name]: Local((Stored("none", a.shape, {"data": a}),)) for name, a in weights.items()}
        held = [(*known, stored[known[0].source_id]) for known in self._leaves.values() if known[0].source_id in stored]
        for old, new in [(old, packed(param, local, packing)) for param, packing, old, local in held]:
            for name in old:
                old[name][...] = new[name]
        return Finished({}, 0.0)

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        self.require_changeable("alloc_caches")
        try:
            self.caches = [Cache(i, p, layout, cache_pages(p, pages[p.group])) for i, p in enumerate(problems)]
        except MemoryError as error:
            raise OutOfMemory(f"no memory for the KV caches ({error}); lower cache.pages") from error
        return self.caches

    def capture(
        self, fn: Any, shape: StepShape, inputs: InputLayout, ops: Any, arrays: Any = None, host_outputs: Any = ()
    ) -> "PlainProgram":
        self.require_changeable("capture")
        return PlainProgram(self, fn, shape, inputs, ops, dict(arrays or {}))

    def read_pages(self, cache: int, ids: Array) -> dict[str, Array]:
        self.require_usable()
        return {name: array[ids] for name, array in self.caches[cache].arrays.items()}

    def write_pages(self, cache: int, ids: Array, pages: Mapping[str, Array]) -> DoneTransfer:
        self.require_usable()
        for name, array in self.caches[cache].arrays.items():
            array[ids] = pages[name]
        return DoneTransfer()

    def copy_pages(self, group: int, src: Array, dst: Array) -> DoneTransfer:
        self.require_usable()
        for cache in (cache for cache in self.caches if cache.problem.group == group):
            self.write_pages(cache.key, dst, self.read_pages(cache.key, src))
        return DoneTransfer()

    def close(self) -> None:
        self.closed, self.weights, self.caches, self._sources, self._leaves = True, {}, [], {}, {}


def packed(param: Param, local: Local, packing: Packing) -> dict[str, Array]:
    """A parameter's own arrays in its packing; the dense one is `data` [out, in]. Raises MisshapenTensor."""
    shape = (sum(part.shape[0] for part in local.parts), *local.parts[0].shape[1:])
    if shape != param.shape:
        raise MisshapenTensor(f"{param.name} has shape {param.shape}, given is {shape}; another shape needs load")
    if packing.pack is not None:
        return {name: np.array(leaf) for name, leaf in packing.pack(param, local).items()}
    return {"data": np.concatenate([dequantize(part, param.dtype) for part in local.parts])}


def cache_pages(p: KVProblem, pages: int) -> dict[str, Array]:
    """Zeroed and committed pages in the canonical form."""
    return {name: np.full((pages, *shape), 0, dtype) for name, (shape, dtype) in p.page_arrays.items()}


class PlainProgram:
    """Runs its function anew at every call; the first is the all-zero step."""

    def __init__(self, session: PlainSession, fn: Any, shape: StepShape, inputs: Any, ops: Any, arrays: Any) -> None:
        self.session, self.fn, self.shape, self.inputs, self.arrays = session, fn, shape, inputs, arrays
        self.ops, self.prepares = ops.bind(session), ops.prepares(session)
        empty = {name: Held(np.zeros(spec.shape, spec.dtype)) for name, spec in arrays.items()}
        self.report = sessions.CaptureReport(self(HostStep(inputs), empty).kernel_seconds)

    def __call__(self, host: HostStep, arrays: Mapping[str, Any] | None = None, after: Any = ()) -> "Finished":
        session, given = self.session, dict(arrays or {})
        session.require_usable()
        sessions.check_handles(self.arrays, given)
        for transfer in after:
            transfer.wait()
        began, step = time.perf_counter(), StepInputs(self.inputs.views(host.buffer.copy()), self.shape)
        with session.poison_on_failure():
            for prepare in self.prepares:
                prepare(host)
            values = {name: held.values for name, held in given.items()}
            outputs, session.caches = self.fn(self.ops, session.weights, list(session.caches), step, values)
        held = {name: Held(np.array(output)) for name, output in outputs.items()}  # a copy: it may be a weight
        return Finished(held, time.perf_counter() - began)


@dataclass(frozen=True)
class Held:
    """A handle: an array to which nothing writes any more."""

    values: Array

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec(self.values.shape, self.values.dtype.name)


@dataclass(frozen=True)
class Finished:
    """A step that was over when its submission returned."""

    outputs: Mapping[str, Held]
    kernel_seconds: float

    def result(self, name: str) -> Array:
        return self.outputs[name].values.copy()

    def handle(self, name: str) -> Held:
        return self.outputs[name]
