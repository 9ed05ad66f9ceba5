"""Captured programs: a tape laid out in memory, replayed by one call of the team for every run of C kernels in it.

Owns the static inputs, the outputs and the handles of one bucket. Programs of a session share its arena, so that one of
them runs at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.sessions import Capture, CaptureReport, Handle, Transfer, check_handles
from lineshaft_contract.steps import ArraySpec, HostStep, StepInputs, StepShape
from lineshaft_cpu.engine.arrays import Buffer, TapeArray
from lineshaft_cpu.engine.checks import StepCheck
from lineshaft_cpu.engine.fusion import fuse
from lineshaft_cpu.engine.tape import HostCall, Linked, Tape
from lineshaft_torch.arena import Lifetime, plan_offsets

if TYPE_CHECKING:
    from lineshaft_cpu.engine.session import NativeSession


@dataclass(frozen=True)
class NativeHandle:
    """A Handle: an output as `program` left it in its run number `run`; the next run of `program` overwrites it."""

    name: str
    array: TapeArray
    program: NativeProgram
    run: int

    @property
    def spec(self) -> ArraySpec:
        return self.array.spec

    def current(self) -> TapeArray:
        """The array. Raises ContractViolation once its program has run again."""
        if self.run != self.program.runs:
            raise ContractViolation(
                f"handle {self.name!r} is stale: its program has run again since; use a handle before the next run of "
                "the program that made it, or list the output in host_outputs"
            )
        return self.array


def array_of(handle: Handle) -> TapeArray:
    """The array of a handle. Raises ContractViolation for one that is stale or of another engine."""
    if not isinstance(handle, NativeHandle):
        raise ContractViolation(f"a handle of the native engine is needed, not {type(handle).__name__}")
    return handle.current()


class NativePending:
    """A step, which may be under way: `result` waits for it and reads host copies made when it ended, `handle` names
    what stays where it is."""

    def __init__(self, program: NativeProgram | None) -> None:
        """Of the run of `program` that begins now; None: nothing is under way, and there are no outputs."""
        self._program = self._running = program
        self._run = 0 if program is None else program.runs
        self._host: dict[str, HostArray] = {}
        self._seconds = 0.0

    @property
    def kernel_seconds(self) -> float:
        self._finish()
        return self._seconds

    def result(self, name: str) -> HostArray:
        """A private host copy. Raises ContractViolation for a stale or unknown output."""
        self._finish()
        found = self._host.get(name)
        return self.handle(name).current().values().copy() if found is None else found.copy()

    def handle(self, name: str) -> NativeHandle:
        """Raises ContractViolation for an unknown output."""
        program, outputs = self._program, {} if self._program is None else self._program.outputs
        if program is None or name not in outputs:
            raise ContractViolation(f"the program has no output {name!r}; it has {', '.join(outputs) or 'none'}")
        return NativeHandle(name, outputs[name], program, self._run)

    def ended(self, seconds: float) -> None:
        """The step is done: copy what the host wants before another overwrites it."""
        if self._running is not None:
            self._host = {name: values.copy() for name, values in self._running.wanted.items()}
        self._running, self._seconds = None, seconds

    def _finish(self) -> None:
        if self._running is not None:
            self._running.session.finish()


class NativeProgram:
    """One bucket. Recorded once, when it is made; from then on its tape is replayed."""

    def __init__(self, session: NativeSession, capture: Capture) -> None:
        began = time.perf_counter()
        self.session, self._capture = session, capture
        self._generation = session.generation
        self.runs = 0
        self._inputs = session.memory.zeros((capture.inputs.nbytes,), "uint8")
        self._given = {
            name: TapeArray(Buffer(spec.nbytes, session.memory.zeros((spec.nbytes,), "uint8")), spec.shape, spec.dtype)
            for name, spec in capture.arrays.items()
        }
        tape = Tape()
        self.outputs = self._record(tape)
        fused = fuse(tape, {id(array.buffer) for array in self.outputs.values()})
        arena = self._place(tape)
        self._parts = [
            part if isinstance(part, HostCall) else Linked(session.native, part, session.team.threads)
            for part in tape.parts()
        ]
        self.wanted = {name: self.outputs[name].values() for name in capture.host_outputs}
        self._calls = tape.calls  # they hold the arrays that the jobs point to
        self._pointers = {name: list(self._pointers_to(array.buffer)) for name, array in self._given.items()}
        calls = [call for part in self._parts if isinstance(part, Linked) for call, _ in part.jobs]
        positions = min((len(call.fields["cos"]) for call in calls if "cos" in call.fields), default=None)
        self._check = StepCheck(session.native, self._inputs, capture.inputs, capture.shape, session.paging, positions)
        self._scratch_bytes = max((part.scratch for part in self._parts if isinstance(part, Linked)), default=0)
        self._scratch = session.reserve_scratch(self._scratch_bytes)
        self._scratch_at = self._scratch.ctypes.data
        self(HostStep(capture.inputs), {name: NativeHandle(name, a, self, 0) for name, a in self._given.items()})
        self.runs = 0
        hosted = sum(isinstance(part, HostCall) for part in self._parts)
        details = {**{f"fused {name}": count for name, count in fused.items()}, "host_calls": hosted}
        self.report = CaptureReport(time.perf_counter() - began, len(tape.calls), arena, details=details)

    @property
    def shape(self) -> StepShape:
        return self._capture.shape

    # ---- capture -----------------------------------------------------------------------------------------------

    def _record(self, tape: Tape) -> dict[str, TapeArray]:
        """Run the forward over arrays without values; returns its outputs, which get memory of their own."""
        session, capture = self.session, self._capture
        step = StepInputs(self._input_arrays(), capture.shape)
        caches = list(session.caches)
        with session.recording(tape):
            outputs, after = capture.fn(capture.ops.bind(session), session.weights, caches, step, dict(self._given))
        if [cache.key for cache in after] != [cache.key for cache in caches]:
            raise ContractViolation(f"the forward returns {len(after)} caches in its order, it was given {len(caches)}")
        missing = capture.host_outputs - outputs.keys()
        if missing:
            raise ContractViolation(f"host_outputs {sorted(missing)} are no outputs of the forward: {sorted(outputs)}")
        for array in outputs.values():
            buffer = array.buffer
            if buffer.held is None:
                buffer.held = session.memory.zeros((buffer.nbytes,), "uint8")
                buffer.address = buffer.held.ctypes.data
        return outputs

    def _input_arrays(self) -> dict[str, TapeArray]:
        """The step's inputs. Tokens at or after the last of query_starts are padding, which later steps leave out."""
        layout = self._capture.inputs
        buffer = Buffer(layout.nbytes, self._inputs)
        found = {f.name: TapeArray(buffer, f.shape, f.dtype, None, layout.offsets[f.name]) for f in layout.fields}
        if "query_starts" in found:
            rows = self._capture.shape.rows
            live = found["query_starts"][rows : rows + 1]
            for name, array in found.items():
                if name in ("token_ids", "positions") or name.startswith("slots."):
                    array.live = live
        return found

    def _place(self, tape: Tape) -> int:
        """Put the arena's buffers at addresses; returns the arena's size in bytes."""
        buffers = tape.lifetimes()
        offsets, size = plan_offsets([Lifetime(b.nbytes, b.first, b.last) for b in buffers])
        self._arena = self.session.reserve_arena(size)
        for buffer, offset in zip(buffers, offsets, strict=True):
            buffer.address = self._arena.ctypes.data + offset
        return size

    def _pointers_to(self, buffer: Buffer) -> Any:
        """(job, field, offset) of everything that points into a buffer."""
        jobs = (pair for part in self._parts if isinstance(part, Linked) for pair in part.jobs)
        for call, job in jobs:
            for name, value in call.fields.items():
                if isinstance(value, TapeArray) and value.buffer is buffer:
                    yield job, name, value.offset

    # ---- steps -------------------------------------------------------------------------------------------------

    def __call__(
        self, host: HostStep, arrays: Mapping[str, Handle] | None = None, after: Sequence[Transfer] = ()
    ) -> NativePending:
        """Run one step. Raises ContractViolation for arrays that were not captured and for inputs out of range; a step
        that fails otherwise poisons the session."""
        session = self.session
        session.require_usable()
        if self._generation != session.generation:
            raise ContractViolation("weights or caches were replaced after this program was captured; capture it again")
        check_handles(self._capture.arrays, arrays or {})
        if host.buffer.nbytes < self._capture.inputs.nbytes:
            needed = self._capture.inputs.nbytes
            raise ContractViolation(f"the step's inputs are {host.buffer.nbytes} bytes, the program's {needed}")
        for transfer in after:
            transfer.wait()
        with session.lock:
            session.finish()
            session.require_usable()
            given = {name: array_of(handle) for name, handle in (arrays or {}).items()}
            self._inputs[...] = host.buffer[: len(self._inputs)]
            self._check()
            with session.poison_on_failure():
                return self._run(given)

    def _run(self, given: Mapping[str, TapeArray]) -> NativePending:
        for name, array in given.items():
            self._point(name, array)
        team, began = self.session.team, time.perf_counter()
        self.runs += 1
        self._read = given  # which lie where the tape reads until it ends
        pending = NativePending(self)
        last = self._parts[-1] if self._parts else None
        for part in self._parts:
            if isinstance(part, HostCall):
                part.run()
                continue
            team.submit(part.address, part.count, self._scratch_at, self._scratch_bytes)
            if part is last:
                self.session.submitted(pending, time.perf_counter() - began)
                return pending
            team.wait()
        pending.ended(time.perf_counter() - began)
        return pending

    def _point(self, name: str, array: TapeArray) -> None:
        """Let the tape read a handle's memory in the place of the array `name`; one with gaps, one that is an output as
        it is, and one that this very program writes to, are copied."""
        own = self._given[name]
        if array is own:
            return
        kept = any(output.buffer in (array.buffer, own.buffer) for output in self.outputs.values())
        if not array.dense or kept or self._hosted:
            own.buffer.address = own.buffer.held.ctypes.data  # type: ignore[union-attr]
            own.values()[...] = array.values()
            start = own.buffer.address
        else:
            start = array.address
        for job, field, offset in self._pointers[name]:
            setattr(job, field, start + offset)

    @property
    def _hosted(self) -> bool:
        return any(isinstance(part, HostCall) for part in self._parts)
