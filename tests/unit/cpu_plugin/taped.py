"""Calls one kernel of the native engine: recorded on a tape over arrays of the test's own, then replayed by a team."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from lineshaft_conformance.harness.rig import Values
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.spec import HostArray, epsilon
from lineshaft_contract.problems import Problem
from lineshaft_contract.sessions import Packing
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_cpu import native
from lineshaft_cpu.engine.arrays import Buffer, TapeArray
from lineshaft_cpu.engine.kernels import engine_kernels
from lineshaft_cpu.engine.session import NativeSession
from lineshaft_cpu.engine.tape import Call, Linked, Tape
from lineshaft_torch.arena import Lifetime, plan_offsets

LEVELS = [level for level in native.LEVELS if native.reason(level) is None]
GARBAGE = 0xFF
"""Fills the arena and the scratch memory: NaN, and ids that are out of range."""


@dataclass(frozen=True)
class Live:
    """An array of which only the first `count` rows belong to tokens."""

    array: HostArray
    count: int


@dataclass(frozen=True)
class Packed:
    """A weight, to be packed as the kernel wants it."""

    array: HostArray
    kind: str


@cache
def kernel(name: str, level: str) -> Kernel:
    """The engine's kernel of that name at a level."""
    return next(k for k in engine_kernels("cpu", native.load(level)) if k.name == name)


def run(
    name: str, problem: Problem, *args: Any, level: str = LEVELS[0], threads: int = 3, **kwargs: Any
) -> list[HostArray]:
    """What the kernel `name` returns for arrays, dicts of arrays, `Live`, `Packed` and static values."""
    found = kernel(name, level)
    session = NativeSession(native.load(level), threads)
    try:
        given = [argument(session, found, problem, item) for item in args]
        named = {key: argument(session, found, problem, item) for key, item in kwargs.items()}
        out = call(session, name, problem, *given, **named)
        return [array.values().copy() for array in (out if isinstance(out, tuple) else (out,))]
    finally:
        session.close()


def call(session: NativeSession, name: str, problem: Any, *args: Any, **kwargs: Any) -> Any:
    """What the kernel `name` returns for the arguments that it takes, after two runs; of the session's level."""
    tape, found = Tape(), kernel(name, session.native.level)
    assert found.supports(problem) is None
    with session.recording(tape):
        out = found.bind(problem, session)(*args, **kwargs)
    play(session, tape)
    return out


def step(**arrays: HostArray) -> Any:
    """Inputs of a step with one cache group."""
    names = ("slots", "context_lens", "page_table")
    group = SimpleNamespace(**{name: held(arrays[name]) for name in names if name in arrays})
    rest = {name: held(array) for name, array in arrays.items() if name not in names}
    return SimpleNamespace(groups=[group], **rest)


def argument(session: NativeSession, found: Kernel, problem: Problem, item: Any) -> Any:
    if isinstance(item, dict):
        return {key: argument(session, found, problem, value) for key, value in item.items()}
    if isinstance(item, Packed):
        array = item.array
        local = Local((Stored("none", array.shape, {"data": array}),))
        param = Param("w", "w", array.shape, array.dtype.name, {item.kind: problem}, lambda checkpoint, at: local)
        return session.load(param, Values({}), {"w": Packing(found.layout, found.pack)})
    if isinstance(item, Live):
        count = np.array([item.count], np.int32)
        return held(item.array, held(count))
    return held(item) if isinstance(item, np.ndarray) else item


def held(array: HostArray, live: TapeArray | None = None) -> TapeArray:
    return TapeArray(Buffer(array.nbytes, array), array.shape, array.dtype.name, live=live)


def play(session: NativeSession, tape: Tape) -> None:
    """Lay a tape out in garbage and run it twice, so that what the first run leaves behind shows in the second."""
    assert all(isinstance(call, Call) for call in tape.calls), "the kernel left work to Python"
    buffers = tape.lifetimes()
    offsets, size = plan_offsets([Lifetime(b.nbytes, b.first, len(tape.calls)) for b in buffers])
    arena = session.reserve_arena(size)
    arena[:] = GARBAGE
    for buffer, offset in zip(buffers, offsets, strict=True):
        buffer.address = arena.ctypes.data + offset
    linked = Linked(session.native, list(calls_of(tape)), session.team.threads)
    scratch = session.reserve_scratch(linked.scratch)
    for _ in range(2):
        scratch[:] = GARBAGE
        session.team.submit(linked.address, linked.count, scratch.ctypes.data, linked.scratch)
        session.team.wait()


def calls_of(tape: Tape) -> Iterator[Call]:
    return (call for call in tape.calls if isinstance(call, Call))


def close(got: HostArray, exact: HostArray, reference: HostArray) -> None:
    """Asserts that got is as near to the exact result as the reference in the executed dtype is."""
    assert np.isfinite(got.astype(np.float64)).all()
    off = np.abs(reference.astype(np.float64) - exact).max()
    assert np.abs(got.astype(np.float64) - exact).max() <= 4 * max(off, epsilon(got.dtype.name) * np.abs(exact).max())
