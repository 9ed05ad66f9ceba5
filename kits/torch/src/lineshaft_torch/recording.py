"""Recording a forward as a tape: one run to learn which results live how long, one to fix where each is put.

Knows bound kernels and tensors; knows nothing of sessions, inputs or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.steps import ArraySpec
from lineshaft_torch.arena import Lifetime, plan_offsets
from lineshaft_torch.bound import BoundKernel
from lineshaft_torch.tensors import map_tensors, spec_of, storage_key, storage_keys, tensors_in, view_at

Step = Callable[[], Any]
"""A call with all its arguments."""


class Callee(Protocol):
    """What is recorded: a bound kernel of this kit, or a stand-in for what is none."""

    @property
    def run(self) -> Callable[..., Any]: ...

    @property
    def out(self) -> bool: ...

    @property
    def name(self) -> str: ...

    @property
    def op(self) -> str: ...

    @property
    def capturable(self) -> bool: ...


@dataclass(frozen=True)
class Foreign:
    """A callable that is no kernel of this kit. Its op is unknown."""

    run: Callable[..., Any]
    name: str
    out: bool = False
    op: str = ""
    capturable: bool = True


@dataclass(frozen=True)
class TapeCall:
    """One entry of a tape: its kernel's name and op, and the tensors that it reads and those that it writes."""

    step: Step
    name: str
    op: str
    capturable: bool
    reads: tuple[torch.Tensor, ...]
    writes: tuple[torch.Tensor, ...]


@dataclass
class Slot:
    """Where a fresh result goes: its shape and dtype, its lifetime, and whether it outlives the program."""

    spec: ArraySpec
    life: Lifetime
    kept: bool = False


@dataclass(frozen=True)
class SurveyedCall:
    """One call of the first run; `slots` has an entry per result tensor, None for one that aliases an argument."""

    run: Callable[..., Any]
    slots: tuple[Slot | None, ...]


class Recorder:
    """What a recording session hands its kernels' calls to. Calls made inside a recorded call are part of it."""

    def __init__(self) -> None:
        self.count = 0
        self.busy = False

    def call(self, kernel: Callee, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run and record a bound kernel."""
        if self.busy:
            return kernel.run(*args, **kwargs)
        with self._inside():
            return self._record(kernel, args, kwargs)

    def foreign(self, name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a callable of the namespace; record it unless it turns out to wrap kernels that record themselves."""
        if isinstance(run, BoundKernel):
            return self.call(run, args, kwargs)
        if self.busy:
            return run(*args, **kwargs)
        before = self.count
        result = run(*args, **kwargs)
        if self.count > before:
            return result
        with self._inside():
            return self._note(Foreign(run, name), args, kwargs, result)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def _record(self, kernel: Callee, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._note(kernel, args, kwargs, kernel.run(*args, **kwargs))

    def _note(self, kernel: Callee, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        raise NotImplementedError


class Survey(Recorder):
    """The first run: learns every result's size and its last use. Results are freed as the forward drops them.

    Calls of `beside` ops may run until something reads their results: what they read lives until then.
    """

    def __init__(self, beside: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.calls: list[SurveyedCall] = []
        self._beside = beside
        self._slots: dict[int, list[Slot]] = {}
        self._until_read: dict[int, list[Slot]] = {}
        self._names: list[StorageWeakRef] = []  # keep storage keys unique without keeping the memory

    def _note(self, kernel: Callee, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        given = storage_keys(tensors_in((args, dict(kwargs))))
        for key in given:
            self._live(key)
        fresh = {key for key in storage_keys(tensors_in(result)) if key not in given}
        for key in fresh:
            self._slots[key] = []
            self._until_read[key] = []
            if kernel.op in self._beside:
                self._until_read[key] = [slot for other in given for slot in self._slots.get(other, ())]
        slots = tuple(self._place(t) if storage_key(t) in fresh else None for t in tensors_in(result))
        self.calls.append(SurveyedCall(kernel.run, slots))
        self.count += 1
        return result

    def _live(self, key: int) -> None:
        for slot in (*self._slots.get(key, ()), *self._until_read.pop(key, ())):
            slot.life.last = self.count

    def _place(self, tensor: torch.Tensor) -> Slot:
        spec = spec_of(tensor)
        slot = Slot(spec, Lifetime(tensor.numel() * tensor.itemsize, self.count, self.count))
        self._slots[storage_key(tensor)].append(slot)
        self._names.append(StorageWeakRef(tensor.untyped_storage()))
        return slot

    def keep(self, tensors: list[torch.Tensor], *, private: bool) -> None:
        """Let results live to the end of the program; `private` ones get memory outside the arena."""
        for key in storage_keys(tensors):
            self._live(key)
            for slot in self._slots.get(key, ()):
                slot.kept = slot.kept or private

    def plan(self) -> Placement:
        """Offsets for everything that does not outlive the program."""
        slots = [slot for call in self.calls for slot in call.slots if slot is not None]
        inside = [slot for slot in slots if not slot.kept]
        offsets, arena = plan_offsets([slot.life for slot in inside])
        where = {id(slot): offset for slot, offset in zip(inside, offsets, strict=True)}
        return Placement(self.calls, where, arena, sum(slot.life.nbytes for slot in slots))


@dataclass(frozen=True)
class Placement:
    """What the first run learnt: the calls, each slot's offset in the arena (by identity), and bytes: the arena's, and
    what all results take together."""

    calls: list[SurveyedCall]
    offsets: Mapping[int, int]
    arena: int
    unshared: int


class Taping(Recorder):
    """The second run: puts every result in its place and writes the tape.

    `known` holds the storages that stay where they are from step to step. Results that outlive the program get memory
    of their own.
    """

    def __init__(self, placement: Placement, arena: torch.Tensor, known: set[int]) -> None:
        super().__init__()
        self.tape: list[TapeCall] = []
        self.read: dict[int, torch.Tensor] = {}  # every tensor that a recorded call takes, by identity
        self._placement, self._arena = placement, arena
        self._known = known | storage_keys([arena])

    def _record(self, kernel: Callee, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not kernel.out:
            return super()._record(kernel, args, kwargs)
        outs = tuple(slot for slot in self._begin(kernel, args, kwargs) if slot is not None)
        step = partial(kernel.run, *args, **kwargs, out=outs[0] if len(outs) == 1 else outs)
        self._add(kernel, step, args, kwargs, outs)
        return step()

    def _note(self, kernel: Callee, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        slots = self._begin(kernel, args, kwargs)
        given = tensors_in(result)
        if len(given) != len(slots):
            raise _impure(self.count)
        step = partial(kernel.run, *args, **kwargs)
        copies = any(slot is not None for slot in slots)
        placed = [given[i] if slot is None else slot for i, slot in enumerate(slots)]
        self._add(kernel, _copying(step, slots) if copies else step, args, kwargs, placed)
        _copy_fresh(slots, given)
        following = iter(placed)
        return map_tensors(lambda _: next(following), result)

    def _add(self, kernel: Callee, step: Step, args: Any, kwargs: Any, writes: Sequence[torch.Tensor]) -> None:
        reads = tuple(tensors_in((args, dict(kwargs))))
        self.tape.append(TapeCall(step, kernel.name, kernel.op, kernel.capturable, reads, tuple(writes)))

    def _begin(self, kernel: Callee, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor | None]:
        """Check the call against the first run and return where its results go."""
        calls = self._placement.calls
        if self.count >= len(calls) or calls[self.count].run is not kernel.run:
            raise _impure(self.count)
        self._check_arguments(tensors_in((args, dict(kwargs))))
        slots = [None if slot is None else self._buffer(slot) for slot in calls[self.count].slots]
        self.count += 1
        return slots

    def _check_arguments(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self.read[id(tensor)] = tensor
            if storage_key(tensor) not in self._known:
                raise ContractViolation(
                    f"call {self.count} of the forward takes an array of shape {list(tensor.shape)} that comes from no "
                    "op, weight or input; a forward may only call ops, reshape and slice"
                )

    def _buffer(self, slot: Slot) -> torch.Tensor:
        if not slot.kept:
            return view_at(self._arena, self._placement.offsets[id(slot)], slot.spec)
        whole = torch.zeros(slot.life.nbytes, dtype=torch.uint8, device=self._arena.device)
        self._known.add(storage_key(whole))
        return view_at(whole, 0, slot.spec)


def _copying(step: Step, slots: list[torch.Tensor | None]) -> Step:
    def run() -> None:
        _copy_fresh(slots, tensors_in(step()))

    return run


def _copy_fresh(slots: list[torch.Tensor | None], given: list[torch.Tensor]) -> None:
    for slot, tensor in zip(slots, given, strict=True):
        if slot is not None:
            slot.copy_(tensor)


def _impure(index: int) -> ContractViolation:
    return ContractViolation(
        f"two runs of the forward differ from call {index} on; which ops it calls may depend on shapes only"
    )


class ReshapeRecording(TorchFunctionMode):
    """Records a reshape that has to copy (one that no view can express) as a call of its own."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._kernel = Foreign(_reshape, "reshape", out=True)
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._recorder.busy or func is not torch.Tensor.reshape or storage_key(result) == storage_key(args[0]):
            return result
        return self._recorder.call(self._kernel, (args[0], tuple(result.shape)), {})


def _reshape(x: torch.Tensor, shape: tuple[int, ...], *, out: torch.Tensor | None = None) -> torch.Tensor:
    return x.reshape(shape) if out is None else out.view(x.shape).copy_(x).view(shape)


def recorded_namespace(ops: Any, recorder: Recorder) -> SimpleNamespace:
    """`ops` with every callable reporting to `recorder`."""
    return SimpleNamespace(
        **{name: partial(recorder.foreign, name, fn) for name, fn in vars(ops).items() if callable(fn)}
    )
