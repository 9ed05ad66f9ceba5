"""Captured programs: one function lowered and compiled for one bucket and all ranks of the session, then replayed.

Inputs travel as one packed buffer; caches are donated and come back; outputs stay on the devices until they are read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.sessions import (
    Cache,
    Capture,
    CaptureReport,
    Handle,
    Transfer,
    check_handles,
)
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepInputs
from lineshaft_jax.arrays import HostArray
from lineshaft_jax.mesh import shards
from lineshaft_jax.report import make_report

if TYPE_CHECKING:
    from lineshaft_jax.session import JaxSession

WORD = 4
"""Bytes of the int32 words in which the packed buffer travels."""


@dataclass(frozen=True)
class DeviceArray:
    """A Handle: an output of a step, each rank's own. Nothing ever overwrites it."""

    array: Any
    ranks: int

    @property
    def spec(self) -> ArraySpec:
        first, *rest = self.array.shape
        return ArraySpec((first // self.ranks, *rest), self.array.dtype.name)


class InFlight:
    """What was submitted and may not be done: steps may finish in any order, and their outputs may be dropped."""

    def __init__(self) -> None:
        self._arrays: list[Any] = []

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Note a step, by its smallest output; forget those that are done."""
        smallest = sorted(outputs.values(), key=lambda array: array.nbytes)[:1]
        self._arrays = [array for array in self._arrays if not array.is_ready()] + smallest

    def wait(self) -> None:
        """Wait until all of them are done; one that failed tells that to whoever reads it."""
        for array in self._arrays:
            with suppress(jax.errors.JaxRuntimeError):
                array.block_until_ready()
        self._arrays = []


class StepPending:
    """A submitted step (a `SharedPending`). `kernel_seconds` runs from the submission until the outputs were there."""

    def __init__(self, session: JaxSession, outputs: Mapping[str, Any]) -> None:
        self._session, self._outputs = session, outputs
        self._began = time.perf_counter()
        self._seconds: float | None = None

    def wait(self) -> float:
        """Wait for all outputs. Returns `kernel_seconds`; a step that failed raises, and poisons the session."""
        if self._seconds is None:
            with self._session.poison_on_failure():
                jax.block_until_ready(list(self._outputs.values()))
            self._seconds = time.perf_counter() - self._began
        return self._seconds

    @property
    def kernel_seconds(self) -> float:
        return self.wait()

    def _array(self, name: str) -> Any:
        if name not in self._outputs:
            raise ContractViolation(f"the program has no output {name!r}; it has {', '.join(self._outputs) or 'none'}")
        return self._outputs[name]

    def result(self, name: str) -> HostArray:
        """A private host copy from the first rank. Raises ContractViolation for an unknown output."""
        return self._read(name, first=True)[0]

    def results(self, name: str) -> list[HostArray]:
        """A private host copy from each rank. Raises ContractViolation for an unknown output."""
        return self._read(name, first=False)

    def _read(self, name: str, *, first: bool) -> list[HostArray]:
        array = self._array(name)
        self.wait()
        return shards(array, first=first)

    def handle(self, name: str) -> DeviceArray:
        """Raises ContractViolation for an unknown output."""
        return DeviceArray(self._array(name), self._session.ranks)


class JaxProgram:
    """A compiled program. Raises ContractViolation where the function leaves the contract."""

    def __init__(self, session: JaxSession, capture: Capture) -> None:
        began = time.perf_counter()
        self.session, self.capture, self.shape = session, capture, capture.shape
        self._generation = session.generation
        self.changes: tuple[bool, ...] = ()  # of each cache, whether the program changes it
        for item in capture.inputs.fields:
            check_field(item)
        if capture.ops.prepares(session):
            raise ContractViolation("a kernel plans on the host, but programs of this kit take inputs alone")
        self._run, cached = session.executable(self)
        seconds = time.perf_counter() - began
        self.report: CaptureReport = make_report(self._run, session, self.changed_caches(), seconds, cached=cached)

    # ---- what is compiled --------------------------------------------------------------------------------------

    def body(
        self, buffer: Any, weights: Sequence[Any], caches: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One step on one rank, to be traced. Only changed caches come back, so that others are no arguments at all."""
        session, capture = self.session, self.capture
        step = StepInputs(
            {item.name: unpack(buffer, capture.inputs, item) for item in capture.inputs.fields}, self.shape
        )
        given = [replace(held, arrays=dict(now)) for held, now in zip(session.caches, caches, strict=True)]
        tree = session.weights.dressed(weights)
        outputs, after = capture.fn(capture.ops.bind(session), tree, list(given), step, dict(arrays))
        check_results(capture, given, outputs, after)
        self.changes = tuple(is_changed(old, new) for old, new in zip(caches, after, strict=True))
        changed = (cache.arrays for cache, flag in zip(after, self.changes, strict=True) if flag)
        return dict(outputs), list(map(dict, changed))

    def arguments(self) -> tuple[Any, ...]:
        """Shapes and places of all arguments, those of `body`."""
        place = self.session.placement
        buffer = jax.ShapeDtypeStruct((self.capture.inputs.nbytes // WORD,), jnp.int32, sharding=place.shared)
        arrays = {
            name: jax.ShapeDtypeStruct(place.joined(spec.shape), numpy_dtype(spec.dtype), sharding=place.own)
            for name, spec in self.capture.arrays.items()
        }
        held = [dict(cache.arrays) for cache in self.session.caches]
        return buffer, abstract(self.session.weights.arrays), abstract(held), arrays

    def adopt(self, changes: Sequence[bool]) -> tuple[Any, Any]:
        """Take over what was known of the program when it was compiled: which caches it changes. Returns the structures
        of its arguments and of its results, which a compiled program on disk lacks."""
        self.changes = tuple(changes)
        held = [dict.fromkeys(cache.arrays, 0) for cache in self.changed_caches()]
        outputs = dict.fromkeys(self.capture.ops.outputs, 0)
        return jax.tree.structure((self.arguments(), {})), jax.tree.structure((outputs, held))

    def changed_caches(self) -> list[Cache]:
        """The session's caches that the program changes."""
        return [cache for cache, flag in zip(self.session.caches, self.changes, strict=True) if flag]

    # ---- replay ------------------------------------------------------------------------------------------------

    def run_empty(self) -> None:
        """Run the all-zero step."""
        place = self.session.placement
        arrays = {
            name: DeviceArray(place.zeros(spec.shape, numpy_dtype(spec.dtype)), place.ranks)
            for name, spec in self.capture.arrays.items()
        }
        self(HostStep(self.capture.inputs), arrays).wait()

    def __call__(
        self, host: HostStep, arrays: Mapping[str, Handle] | None = None, after: Sequence[Transfer] = ()
    ) -> StepPending:
        """Submit one step. Raises ContractViolation for arrays that were not captured or lie elsewhere; a step that
        fails otherwise poisons the session."""
        session = self.session
        session.require_usable()
        if self._generation != session.generation:
            raise ContractViolation("weights or caches were replaced after this program was captured; capture it again")
        check_handles(self.capture.arrays, arrays or {})
        given = self._own(arrays or {})
        for transfer in after:
            transfer.wait()
        words = host.buffer[: self.capture.inputs.nbytes].view(np.int32).copy()  # XLA may keep reading what it is given
        with session.poison_on_failure():
            held = [cache.arrays for cache in session.caches]
            outputs, changed = self._run(words, session.weights.arrays, held, given)
        for cache, now in zip(self.changed_caches(), changed, strict=True):
            cache.arrays.update(now)
        session.flight.add(outputs)
        return StepPending(session, outputs)

    def _own(self, handles: Mapping[str, Handle]) -> dict[str, Any]:
        """The arrays of handles. Raises ContractViolation for one of a session on other devices."""
        own, given = self.session.placement.own, {}
        for name, handle in handles.items():
            array = getattr(handle, "array", None)
            if not isinstance(array, jax.Array) or not array.sharding.is_equivalent_to(own, array.ndim):
                raise ContractViolation(f"array {name!r} is of a session on other devices; give this session's own")
            given[name] = array
        return given


def check_field(item: InputField) -> None:
    """Raises ContractViolation for an input that cannot travel in words of 32 bits."""
    if np.dtype(item.dtype).itemsize > WORD:
        raise ContractViolation(f"input {item.name!r} is {item.dtype}; inputs of this kit have at most 32 bits a value")


def unpack(buffer: Any, layout: InputLayout, item: InputField) -> Any:
    """One input as an array: buffer int32[nbytes / 4] -> item.dtype [item.shape]."""
    dtype, count = numpy_dtype(item.dtype), math.prod(item.shape)
    start = layout.offsets[item.name] // WORD
    words = lax.slice(buffer, (start,), (start + -(-count * dtype.itemsize // WORD),))
    values = words if dtype == np.int32 else lax.bitcast_convert_type(words, dtype)
    return values.reshape(-1)[:count].reshape(item.shape)


def check_results(capture: Capture, given: Sequence[Cache], outputs: Mapping[str, Any], after: Sequence[Cache]) -> None:
    """Raises ContractViolation unless all caches come back in order, and every output that the host wants is there."""
    if [cache.key for cache in after] != [cache.key for cache in given]:
        raise ContractViolation(f"the forward returns {len(after)} caches in its order, it was given {len(given)}")
    missing = capture.host_outputs - outputs.keys()
    if missing:
        raise ContractViolation(f"host_outputs {sorted(missing)} are no outputs of the forward: {sorted(outputs)}")


def is_changed(given: Mapping[str, Any], after: Cache) -> bool:
    """Whether a cache comes back with other arrays than it went in with."""
    return any(after.arrays[name] is not array for name, array in given.items())


def abstract(tree: Any) -> Any:
    """Shape, dtype and place of every array."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
