"""Sessions of the reference backend: NumPy arrays, eager programs, caches that are copied at every write."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lineshaft_contract.errors import MisshapenTensor
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.restricted import Restricted
from lineshaft_contract.schemes import check_parts, dequantize
from lineshaft_contract.sessions import (
    Cache,
    CaptureReport,
    DoneTransfer,
    Handle,
    HostArray,
    Packing,
    PlannedOps,
    SessionState,
    StepFunction,
    Transfer,
    Tree,
    check_handles,
    map_tree,
)
from lineshaft_contract.steps import ArraySpec, HostStep, InputLayout, StepInputs, StepShape
from lineshaft_contract.weights import Checkpoint, Coordinate, Param, Weight


class ValueArray(Restricted):
    """A NumPy array that lets a forward do only what the contract allows."""

    __slots__ = ("values",)

    def __init__(self, values: HostArray) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec(self.values.shape, self.values.dtype.name)

    def _reshaped(self, shape: tuple[int, ...]) -> ValueArray:
        return ValueArray(self.values.reshape(shape))

    def _sliced(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> ValueArray:
        return ValueArray(self.values[index])


@dataclass(frozen=True)
class ReferencePending:
    """A finished step."""

    outputs: Mapping[str, ValueArray]
    kernel_seconds: float

    def result(self, name: str) -> HostArray:
        return self.outputs[name].values.copy()

    def handle(self, name: str) -> Handle:
        return self.outputs[name]


class ReferenceProgram:
    """Runs its function anew at every call."""

    def __init__(
        self, session: ReferenceSession, fn: StepFunction, shape: StepShape, ops: Any, arrays: Mapping[str, ArraySpec]
    ) -> None:
        self._session, self._fn, self._ops, self._arrays = session, fn, ops, arrays
        self.shape = shape
        self.report = CaptureReport(0.0)
        self.replaced: list[Cache] = []  # caches of which the last run made a copy

    def __call__(
        self, host: HostStep, arrays: Mapping[str, Any] | None = None, after: Sequence[Transfer] = ()
    ) -> ReferencePending:
        self._session.require_usable()
        check_handles(self._arrays, arrays or {})
        began = time.perf_counter()
        step = StepInputs({name: ValueArray(view.copy()) for name, view in host.views.items()}, self.shape)
        session, before = self._session, self._session.caches
        with session.poison_on_failure():
            outputs, session.caches = self._fn(self._ops, session.weights, list(before), step, dict(arrays or {}))
        self.replaced = [now for now, old in zip(session.caches, before, strict=True) if now is not old]
        return ReferencePending(outputs, time.perf_counter() - began)


class ReferenceSession(SessionState):
    """Owns NumPy weights and caches. See `lineshaft_contract.sessions.Session` for what each method promises."""

    def __init__(self) -> None:
        self.weights: Tree = {}
        self.caches: list[Cache] = []
        self._params: dict[str, tuple[Param, Weight]] = {}
        self._shared: dict[tuple[Any, ...], dict[str, HostArray]] = {}  # keys begin with the source

    # ---- weights and caches ------------------------------------------------------------------------------------

    def load(self, params: Tree, checkpoint: Checkpoint, packings: Mapping[str, Packing]) -> Tree:
        self.require_changeable("load")
        self._params, self._shared = {}, {}
        self.weights = map_tree(lambda param: self._weight(param, checkpoint), params)
        return self.weights

    def _weight(self, param: Param, checkpoint: Checkpoint) -> Weight | ValueArray:
        if param.name not in self._params:
            same = (param.source_id, param.shape, param.dtype)
            if same not in self._shared:
                self._shared[same] = {"data": _values(param, checkpoint)}
            weight = Weight(len(self._params), param.name, param.problems, "", self._shared[same])
            self._params[param.name] = (param, weight)
        weight = self._params[param.name][1]
        return ValueArray(weight.arrays["data"]) if "const" in param.problems else weight

    def update(self, weights: Mapping[str, HostArray]) -> ReferencePending:
        self.require_usable()
        found = [(held, values) for name, values in weights.items() for held in self._held(name, values.shape)]
        for held, values in found:
            held[...] = values
        return ReferencePending({}, 0.0)

    def _held(self, name: str, shape: tuple[int, ...]) -> list[HostArray]:
        """Every array of the parameter's source."""
        if name not in self._params:
            raise MisshapenTensor(f"update of {name!r}: no such parameter is loaded; load it first")
        source = self._params[name][0].source_id
        held = [arrays["data"] for same, arrays in self._shared.items() if same[0] == source]
        for array in held:
            if array.shape != shape:
                raise MisshapenTensor(f"{name} has shape {array.shape}, the update brings {shape}; load it anew")
        return held

    def alloc_caches(self, problems: Sequence[KVProblem], pages: Sequence[int], layout: str) -> list[Cache]:
        self.require_changeable("alloc_caches")
        self.caches = [Cache(i, p, layout, self._pages(p, pages[p.group])) for i, p in enumerate(problems)]
        return self.caches

    def _pages(self, p: KVProblem, pages: int) -> dict[str, HostArray]:
        return {name: np.zeros((pages, *shape), numpy_dtype(dtype)) for name, (shape, dtype) in p.page_arrays.items()}

    # ---- programs ----------------------------------------------------------------------------------------------

    def capture(
        self,
        fn: StepFunction,
        shape: StepShape,
        inputs: InputLayout,
        ops: PlannedOps,
        arrays: Mapping[str, ArraySpec] | None = None,
        host_outputs: frozenset[str] = frozenset(),
    ) -> ReferenceProgram:
        self.require_changeable("capture")
        began = time.perf_counter()
        program = ReferenceProgram(self, fn, shape, ops.bind(self), arrays or {})
        given = {name: ValueArray(np.zeros(s.shape, numpy_dtype(s.dtype))) for name, s in (arrays or {}).items()}
        program(HostStep(inputs), given)
        copied = sum(array.nbytes for cache in program.replaced for array in cache.arrays.values())
        program.report = CaptureReport(time.perf_counter() - began, cache_copied=copied)
        return program

    # ---- pages -------------------------------------------------------------------------------------------------

    def read_pages(self, cache: int, ids: HostArray) -> dict[str, HostArray]:
        self.require_usable()
        return {name: pages[ids] for name, pages in self.caches[cache].arrays.items()}

    def write_pages(self, cache: int, ids: HostArray, pages: Mapping[str, HostArray]) -> DoneTransfer:
        self.require_usable()
        held = self.caches[cache]
        arrays = {name: array.copy() for name, array in held.arrays.items()}
        for name, values in pages.items():
            arrays[name][ids] = values
        self.caches[cache] = replace(held, arrays=arrays)
        return DoneTransfer()

    def copy_pages(self, group: int, src: HostArray, dst: HostArray) -> DoneTransfer:
        self.require_usable()
        for cache in self.caches:
            if cache.problem.group == group:
                self.write_pages(cache.key, dst, self.read_pages(cache.key, src))
        return DoneTransfer()

    def close(self) -> None:
        self.closed = True
        self.weights, self.caches = {}, []
        self._params, self._shared = {}, {}


def _values(param: Param, checkpoint: Checkpoint) -> HostArray:
    local = param.shard(checkpoint, Coordinate())
    check_parts(param, local)
    return np.concatenate([dequantize(part, param.dtype) for part in local.parts]).reshape(param.shape)
