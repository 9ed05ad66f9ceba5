"""Recording a tape: what each step calls with which arrays, and where the arrays will lie."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

from lineshaft_contract.errors import Unsupported
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import itemsize
from lineshaft_cpu.engine.arrays import Buffer, TapeArray
from lineshaft_cpu.native import AGAIN, Native

Field = TapeArray | HostArray | int | float | None


@dataclass(frozen=True)
class Job:
    """What a C kernel is given: the name of its functions and the fields of its struct, in order."""

    name: str
    fields: tuple[tuple[str, Any], ...]
    cut: bool = False  # whether `<name>_cut` completes it

    @property
    def struct(self) -> type[ctypes.Structure]:
        return _struct(self)


@cache
def _struct(job: Job) -> type[ctypes.Structure]:
    return type(job.name, (ctypes.Structure,), {"_fields_": list(job.fields)})


@dataclass
class Call:
    """One call of a C kernel: pointers are arrays of the tape or of the host, or a job within the job, until the tape
    is laid out."""

    job: Job
    fields: Mapping[str, Any]
    reads: tuple[TapeArray, ...]
    writes: tuple[TapeArray, ...]
    op: str
    scratch: int = 0  # bytes that each thread needs


@dataclass
class HostCall:
    """A call of Python between two runs of the team: for ops without a C kernel."""

    run: Callable[[], None]
    reads: tuple[TapeArray, ...]
    writes: tuple[TapeArray, ...]
    op: str


@dataclass
class Tape:
    """The calls of one program in order, as they are recorded."""

    calls: list[Call | HostCall] = field(default_factory=list)

    def new(self, shape: Sequence[int], dtype: str, live: TapeArray | None = None) -> TapeArray:
        """An array in the arena, for a call to write to."""
        return TapeArray(Buffer(max(1, prod(shape) * itemsize(dtype))), shape, dtype, live=live)

    def add(
        self,
        job: Job,
        op: str,
        reads: Sequence[TapeArray],
        writes: Sequence[TapeArray],
        fields: Mapping[str, Any],
        scratch: int = 0,
    ) -> None:
        """Record a call of a C kernel."""
        self.calls.append(Call(job, fields, tuple(reads), tuple(writes), op, scratch))

    def host(self, run: Callable[[], None], op: str, reads: Sequence[TapeArray], writes: Sequence[TapeArray]) -> None:
        """Record a call of Python."""
        self.calls.append(HostCall(run, tuple(reads), tuple(writes), op))

    def parts(self) -> Iterator[list[Call] | HostCall]:
        """Runs of C calls, and the host calls between them."""
        run: list[Call] = []
        for call in self.calls:
            if isinstance(call, Call):
                run.append(call)
                continue
            if run:
                yield run
            run = []
            yield call
        if run:
            yield run

    def lifetimes(self) -> list[Buffer]:
        """The buffers of the arena, each with the first and last call that touches it."""
        found: dict[int, Buffer] = {}
        for number, call in enumerate(self.calls):
            for array in (*call.reads, *call.writes):
                buffer = array.buffer
                if buffer.held is None:
                    found.setdefault(id(buffer), buffer)
                    buffer.first = number if buffer.first < 0 else buffer.first
                    buffer.last = number
        return list(found.values())


STEP_BYTES = 3 * ctypes.sizeof(c_void_p)
"""Of `lineshaft_step` in `native/team.h`: the addresses of body, count and job."""

HEAD = 128
"""Bytes in front of a thread's scratch (LINESHAFT_HEAD in `native/team.h`); scratches begin at multiples of them."""


class Linked:
    """A run of C calls as the team replays it: jobs and steps in memory that stays where it is."""

    def __init__(self, native: Native, calls: Sequence[Call], threads: int) -> None:
        self.jobs: list[tuple[Call, ctypes.Structure]] = []  # those within others too
        tops = [self._job(native, call, threads) for call in calls]
        self.count = len(calls)
        most = max((call.scratch for call in calls), default=0)
        self.scratch = HEAD + -(-most // HEAD) * HEAD  # bytes of each thread
        self.steps = (c_void_p * (3 * len(calls)))()
        for i, (call, job) in enumerate(zip(calls, tops, strict=True)):
            body, items = functions(native, call.job)
            self.steps[3 * i], self.steps[3 * i + 1], self.steps[3 * i + 2] = body, items, ctypes.addressof(job)
        self.address = ctypes.addressof(self.steps)

    def _job(self, native: Native, call: Call, threads: int) -> ctypes.Structure:
        fields = call.fields
        job = call.job.struct(*[self._field(native, fields.get(name, 0), threads) for name, _ in call.job.fields])
        if call.job.cut:
            native.function(f"{call.job.name}_cut", c_void_p, ctypes.c_int)(ctypes.addressof(job), threads)
        self.jobs.append((call, job))
        return job

    def _field(self, native: Native, value: Any, threads: int) -> int | float | None:
        """What a field holds: of a job within the job, its address."""
        if isinstance(value, Call):
            return ctypes.addressof(self._job(native, value, threads))
        return pointer_of(value)


def pointer_of(value: TapeArray | HostArray | int | float | None) -> int | float | None:
    """What a field of a job holds: of an array, its address."""
    if value is None or isinstance(value, _NUMBERS):
        return value
    if isinstance(value, TapeArray):
        return value.buffer.address + value.offset
    return int(value.ctypes.data)


_NUMBERS = (int, float)


@cache
def functions(native: Native, job: Job) -> tuple[int, int]:
    """Addresses of a kernel's body and count; raises Unsupported where the library is of another build."""
    size = native.value(f"{job.name}_bytes", c_int64)
    if size != ctypes.sizeof(job.struct):
        raise Unsupported(
            f"a job of {job.name} has {size} bytes in the library and {ctypes.sizeof(job.struct)} here: it is of "
            f"another build; {AGAIN}"
        )
    return native.address(f"{job.name}_body"), native.address(f"{job.name}_items")
