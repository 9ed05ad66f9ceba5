"""Captured programs: a tape of calls over static buffers, and the eager kind that runs the forward anew each step.

Owns static inputs, outputs and handles. Programs of a session share its arena, so one of them runs at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.sessions import (
    Cache,
    Capture,
    CaptureReport,
    Handle,
    Pending,
    Transfer,
    check_handles,
)
from lineshaft_contract.steps import ArraySpec, HostStep, StepInputs, StepShape
from lineshaft_torch.arrays import HostArray, to_host, torch_dtype
from lineshaft_torch.recording import (
    Placement,
    Recorder,
    ReshapeRecording,
    Step,
    Survey,
    TapeCall,
    Taping,
    recorded_namespace,
)
from lineshaft_torch.tensors import spec_of, storage_key, storage_keys, view_at


@dataclass(frozen=True)
class DeviceArray:
    """A Handle: an output as `program` left it in its run number `run`; the next run of `program` overwrites it."""

    name: str
    tensor: torch.Tensor
    program: ProgramBase
    run: int

    @property
    def spec(self) -> ArraySpec:
        return spec_of(self.tensor)

    def current(self) -> torch.Tensor:
        """The tensor. Raises ContractViolation once its program has run again."""
        if self.run != self.program.runs and self.program.overwrites:
            raise ContractViolation(
                f"handle {self.name!r} is stale: its program has run again since; use a handle before the next run of "
                "the program that made it, or list the output in host_outputs"
            )
        return self.tensor


class StepPending:
    """A finished step; `result` reads host copies made at once, `handle` names what stays on the device."""

    def __init__(
        self, handles: Mapping[str, DeviceArray], host: Mapping[str, HostArray], kernel_seconds: float = 0.0
    ) -> None:
        self._handles, self._host = handles, host
        self.kernel_seconds = kernel_seconds

    def result(self, name: str) -> HostArray:
        """A private host copy. Raises ContractViolation for a stale or unknown output."""
        found = self._host.get(name)
        return to_host(self.handle(name).current()) if found is None else found.copy()

    def handle(self, name: str) -> DeviceArray:
        """Raises ContractViolation for an unknown output."""
        if name not in self._handles:
            raise ContractViolation(f"the program has no output {name!r}; it has {', '.join(self._handles) or 'none'}")
        return self._handles[name]


class ProgramBase:
    """What both kinds share: static inputs, host planning, checks and the order of a submission."""

    overwrites = False
    """Whether a run overwrites the outputs of the run before."""

    def __init__(self, session: Any, capture: Capture) -> None:
        self.session, self.capture = session, capture
        self.runs = 0
        self._generation = session.generation
        self.report = CaptureReport(0.0)
        self.ops = capture.ops.bind(session)
        self._prepares = capture.ops.prepares(session)
        self.step = StepInputs(self._make_inputs(), capture.shape)

    def _make_inputs(self) -> dict[str, torch.Tensor]:
        """The static inputs, by name."""
        inputs = self.capture.inputs
        self._buffer = torch.zeros(inputs.nbytes, dtype=torch.uint8, device=self.session.device)
        return {
            item.name: view_at(self._buffer, inputs.offsets[item.name], ArraySpec(item.shape, item.dtype))
            for item in inputs.fields
        }

    @property
    def shape(self) -> StepShape:
        return self.capture.shape

    def __call__(
        self, host: HostStep, arrays: Mapping[str, Handle] | None = None, after: Sequence[Transfer] = ()
    ) -> Pending:
        """Run one step. Raises ContractViolation for arrays that were not captured; a step that fails otherwise
        poisons the session."""
        self.session.require_usable()
        if self._generation != self.session.generation:
            raise ContractViolation("weights or caches were replaced after this program was captured; capture it again")
        check_handles(self.capture.arrays, arrays or {})
        self.make_ready()
        given = {name: self._taken(handle) for name, handle in (arrays or {}).items()}
        for transfer in after:
            self._follow(transfer)
        with self.session.mode(), self.session.poison_on_failure():
            return self._submit(host, given)

    def make_ready(self) -> None:
        """Do what is left to do before a run."""

    def _follow(self, transfer: Transfer) -> None:
        """Let the run come after a transfer."""
        transfer.wait()

    def _submit(self, host: HostStep, given: dict[str, torch.Tensor]) -> Pending:
        """Run the step, and copy what the host wants."""
        self._take_inputs(host)
        began = time.perf_counter()
        outputs = self._run(given)
        seconds = time.perf_counter() - began
        copies = {name: to_host(outputs[name]) for name in self.capture.host_outputs}
        return StepPending(self._handles(outputs), copies, seconds)

    def _handles(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, DeviceArray]:
        """Handles of the run that has just been made."""
        self.runs += 1
        return {name: DeviceArray(name, tensor, self, self.runs) for name, tensor in outputs.items()}

    def _take_inputs(self, host: HostStep) -> None:
        self._buffer.copy_(torch.from_numpy(host.buffer[: self._buffer.numel()]))
        for prepare in self._prepares:
            prepare(host)

    def _run(self, arrays: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        raise NotImplementedError

    def _taken(self, handle: Any) -> torch.Tensor:
        """A handle's tensor; a copy of it if this very run overwrites it."""
        tensor = handle.current()
        return tensor.clone() if handle.program is self and self.overwrites else tensor

    def _empty_step(self) -> dict[str, torch.Tensor]:
        """Make the static inputs the all-zero step and return zeros for the arrays."""
        empty = HostStep(self.capture.inputs)
        self._buffer.zero_()
        for prepare in self._prepares:
            prepare(empty)
        return {name: self._zeros(spec) for name, spec in self.capture.arrays.items()}

    def _zeros(self, spec: ArraySpec) -> torch.Tensor:
        return torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype), device=self.session.device)

    def _call_forward(self, ops: Any, arrays: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[Cache]]:
        caches = list(self.session.caches)
        outputs, after = self.capture.fn(ops, self.session.weights, caches, self.step, arrays)
        if [cache.key for cache in after] != [cache.key for cache in caches]:
            raise ContractViolation(f"the forward returns {len(after)} caches in its order, it was given {len(caches)}")
        missing = self.capture.host_outputs - outputs.keys()
        if missing:
            raise ContractViolation(f"host_outputs {sorted(missing)} are no outputs of the forward: {sorted(outputs)}")
        return outputs, after


def moved_arrays(own: Sequence[Cache], after: Sequence[Cache]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(the session's array, the forward's result) for each cache array that was not updated in place."""
    return [
        (old.arrays[name], new.arrays[name])
        for old, new in zip(own, after, strict=True)
        for name in old.arrays
        if old.arrays[name].data_ptr() != new.arrays[name].data_ptr()
    ]


class EagerProgram(ProgramBase):
    """Runs the forward anew each step, with fresh outputs; adopts the caches that it returns."""

    def __init__(self, session: Any, capture: Capture) -> None:
        super().__init__(session, capture)
        start = time.perf_counter()
        counter = Survey()
        arrays = self._empty_step()
        with session.recording(counter):
            _, after = self._call_forward(recorded_namespace(self.ops, counter), arrays)
        copied = self._adopt(after)
        self.report = CaptureReport(time.perf_counter() - start, ops=counter.count, cache_copied=copied)

    def _run(self, arrays: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        outputs, after = self._call_forward(self.ops, arrays)
        self._adopt(after)
        return {name: self._own(tensor, arrays) for name, tensor in outputs.items()}

    def _own(self, tensor: torch.Tensor, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        """A copy of an output that is a static input, which the next step overwrites."""
        borrowed = storage_key(tensor) in storage_keys([self._buffer, *arrays.values()])
        return tensor.clone() if borrowed else tensor

    def _adopt(self, after: Sequence[Cache]) -> int:
        moved = moved_arrays(self.session.caches, after)
        self.session.caches = list(after)
        return sum(new.nbytes for _, new in moved)


class TapeProgram(ProgramBase):
    """Replays a recorded list of calls, every argument and result of which stays where it was when recorded.

    The forward runs twice at capture, on the all-zero step. The first run learns how long each result lives; a plan
    then puts results at offsets of the session's arena, and outputs into memory of their own. The second run writes
    the tape. Reshapes and slices happen at capture only. Handles are bound by pointing the recorded tensors at the
    handle's memory, so that nothing is copied.
    """

    overwrites = True

    def __init__(self, session: Any, capture: Capture) -> None:
        super().__init__(session, capture)
        start = time.perf_counter()
        self._calls: list[TapeCall] = []
        self._tape: list[Step] = []
        self._arrays: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._aliases: dict[str, list[_Alias]] = {}
        self._bound: dict[str, int] = {}
        self._placement, copied = self._survey()
        session.reserve_arena(self._placement.arena)
        self._record()
        self.report = CaptureReport(
            time.perf_counter() - start, ops=len(self._tape), arena=self._placement.arena,
            temporaries=self._placement.unshared, cache_copied=copied,
        )  # fmt: skip

    def _survey(self) -> tuple[Placement, int]:
        survey = Survey(self._beside())
        outputs, after = self._observe(survey, self._empty_step())
        moved = [new for _, new in moved_arrays(self.session.caches, after)]
        survey.keep(moved, private=False)
        survey.keep(list(outputs.values()), private=True)
        return survey.plan(), sum(tensor.nbytes for tensor in moved)

    def _beside(self) -> frozenset[str]:
        """The ops whose calls may run beside those that follow them."""
        return frozenset()

    def _record(self) -> None:
        arrays = self._empty_step()
        static = [self._buffer, *arrays.values(), *self.session.tensors()]
        taping = Taping(self._placement, self.session.arena, storage_keys(static))
        outputs, after = self._observe(taping, arrays)
        for old, new in moved_arrays(self.session.caches, after):
            old.copy_(new)
            taping.tape.append(_copy_into(old, new))
        self._outputs, self._arrays, self._calls = outputs, arrays, taping.tape
        self._tape = [call.step for call in self._calls]
        recorded = [*taping.read.values(), *outputs.values()]
        self._aliases = {name: _aliases(tensor, recorded) for name, tensor in arrays.items()}
        self._bound = {}

    def _observe(
        self, recorder: Recorder, arrays: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[Cache]]:
        with self.session.recording(recorder), ReshapeRecording(recorder):
            return self._call_forward(recorded_namespace(self.ops, recorder), arrays)

    def _run(self, arrays: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        for name, tensor in arrays.items():
            self._point(name, tensor)
        for call in self._tape:
            call()
        return self._outputs

    def _point(self, name: str, tensor: torch.Tensor) -> None:
        """Let the recorded tensors of the array `name` read the memory of `tensor`."""
        source = tensor.contiguous()
        if self._bound.get(name) == source.data_ptr():
            return
        for alias in self._aliases[name]:
            alias.point(source)
        self._bound[name] = source.data_ptr() if source is tensor else 0


@dataclass(frozen=True)
class _Alias:
    """A recorded tensor that views an array at `offset` elements."""

    tensor: torch.Tensor
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def point(self, source: torch.Tensor) -> None:
        start = source.storage_offset() + self.offset
        self.tensor.set_(source.untyped_storage(), start, self.shape, self.stride)


def _aliases(array: torch.Tensor, read: Sequence[torch.Tensor]) -> list[_Alias]:
    key = storage_key(array)
    return [
        _Alias(t, int(t.storage_offset() - array.storage_offset()), tuple(t.shape), t.stride())
        for t in {id(t): t for t in read}.values()
        if storage_key(t) == key
    ]


def _copy_into(old: torch.Tensor, new: torch.Tensor) -> TapeCall:
    return TapeCall(partial(old.copy_, new), "copy", "", True, (new,), (old,))
