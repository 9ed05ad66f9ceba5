"""A device without hardware: streams, events and graphs over CPU tensors, as strict as a real device about order.

Work runs when something waits for it, or as early as it may, so that a wait that is missing gives wrong results. A
graph repeats the operators that it has seen, never the Python around them. For tests, and to run host code without a
device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lineshaft_torch.device import Call, Pool
from lineshaft_torch.host_memory import HostMemory
from lineshaft_torch.tensors import storage_key, storage_keys, tensors_in

SYNCHRONIZING = frozenset(
    {
        "item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2",
        "unique_dim", "unique_consecutive", "repeat_interleave",
    }
)  # fmt: skip
"""Operators that need values on the host, and so wait for the device."""
SHAPING = frozenset({"empty", "empty_like", "new_empty", "detach", "view", "slice", "select", "lift_fresh"})
"""Operators that look at no values."""
READING = frozenset({"tolist", "numpy", "cpu", "__array__"})
"""Methods of tensors that do, without an operator that tells so."""
UNTOLD = 1 << 40
"""Bytes of a host that does not tell how many it has."""


class FakeStream:
    """A queue of work; the front of it runs first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[_Work | FakeEvent] = deque()

    def __repr__(self) -> str:
        return f"stream {self.name}"


@dataclass(frozen=True)
class _Work:
    """Something to run (`event` None), or a wait for an event."""

    name: str
    run: Callable[[], Any] | None
    event: FakeEvent | None = None


class FakeEvent:
    """A point in a stream; passed when all before it has run."""

    def __init__(self, device: FakeDevice, stream: FakeStream) -> None:
        self._device, self.stream = device, stream
        self.passed_at = 0.0
        self.serial = 0  # how much work of its stream a captured event covers

    @property
    def passed(self) -> bool:
        return self.passed_at > 0

    def query(self) -> bool:
        """Whether it has passed; if not, the device gets on with one piece of work."""
        self._device.forbid("event.query")
        if not self.passed:
            self._device.turn(self.stream)
            return False
        return True

    def synchronize(self) -> None:
        self._device.forbid("event.synchronize")
        self._device.reach(self)

    def seconds_until(self, later: FakeEvent) -> float:
        return later.passed_at - self.passed_at


@dataclass
class FakePool:
    """Memory of graphs, gone with the last of them."""

    graphs: int = 0
    used: bool = False


class FakeGraph:
    """Captured operators, repeated on the same tensors in the streams that they were captured on."""

    def __init__(self, device: FakeDevice, pool: FakePool) -> None:
        self._device, self._pool = device, pool
        self._items: list[tuple[str, FakeStream, Any]] = []
        self._work: dict[FakeStream, int] = {device.main: 0}
        self._joined: dict[FakeStream, int] = {}
        self._events: set[FakeEvent] = set()
        self._alive = True

    def add(self, name: str, stream: FakeStream, node: _Node) -> None:
        """Note work of a stream, which has to belong to the capture."""
        if stream not in self._work:
            raise _illegal(f"{name} on {stream}, which waits for nothing of the capture")
        self._work[stream] += 1
        self._items.append((name, stream, node))

    def record(self, event: FakeEvent) -> None:
        event.serial = self._work.get(event.stream, 0)
        self._events.add(event)
        self._items.append(("record", event.stream, event))

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        if event not in self._events:
            raise _illegal(f"a wait of {stream} for an event from outside of the capture")
        self._work.setdefault(stream, 0)
        if stream is self._device.main:
            self._joined[event.stream] = max(self._joined.get(event.stream, 0), event.serial)
        self._items.append(("wait", stream, event))

    def end(self) -> None:
        """Check that all forks have joined; memory of temporaries holds nothing until a replay."""
        for stream, count in self._work.items():
            if stream is not self._device.main and count > self._joined.get(stream, 0):
                raise _illegal(f"work of {stream} that the main stream does not wait for before the capture ends")
        for _, _, node in self._items:
            if isinstance(node, _Node):
                node.scribble()

    def replay(self) -> None:
        if not self._alive:
            raise RuntimeError("device error: replay of a graph that was reset")
        events: dict[FakeEvent, FakeEvent] = {}
        for name, stream, item in self._items:
            with self._device.on(stream):
                if name == "record":
                    events[item] = self._device.record()
                elif name == "wait":
                    self._device.wait(events[item])
                else:
                    self._device.enqueue(name, item.repeat)

    def reset(self) -> None:
        if self._alive:
            self._items, self._alive = [], False
            self._pool.graphs -= 1


@dataclass
class _Node:
    """One captured operator: repeated, its fresh results go to where they went at capture."""

    run: Callable[[], Any]
    reads: list[torch.Tensor]
    fresh: list[torch.Tensor | None] = field(default_factory=list)  # by result; None for one that aliases an argument

    def __post_init__(self) -> None:
        held = [*self.reads, *(tensor for tensor in self.fresh if tensor is not None)]
        self._addresses = [(tensor, tensor.data_ptr()) for tensor in held]

    def repeat(self) -> None:
        for tensor, address in self._addresses:
            if tensor.data_ptr() != address:
                raise RuntimeError("device error: illegal memory access, captured memory has moved")
        found = self.run()
        if any(tensor is not None for tensor in self.fresh):
            for kept, tensor in zip(self.fresh, tensors_in(found), strict=True):
                if kept is not None:
                    kept.copy_(tensor)

    def scribble(self) -> None:
        for tensor in self.fresh:
            if tensor is not None and tensor.is_floating_point() and tensor.itemsize > 1:
                tensor.fill_(torch.nan)


class FakeDevice:
    """A DeviceLayer over CPU tensors.

    lazy     the streams, by name, whose work runs only when something waits for it; that of the others runs as soon as
             its own waits permit. A program that lacks a wait is wrong under some choice of them.
    budget   bytes that tensors made inside `on` may take together (None: what the host has)
    ran      names of the work that has run, in the order in which it ran
    """

    granule = 1

    def __init__(self, lazy: Sequence[str] = ("main", "side"), budget: int | None = None) -> None:
        self.device = torch.device("cpu")
        self.main, self.side = FakeStream("main"), FakeStream("side")
        self.ran: list[str] = []
        self._lazy, self._budget = frozenset(lazy), budget
        self._current = [self.main]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._graph: FakeGraph | None = None
        self._label = ""
        self._busy = False  # work runs: it is no new work of its own
        self._hangs = False
        self.failure: BaseException | None = None
        self.assigns = False  # a number that is assigned to a slice is an argument, no tensor of the host

    # ---- the layer ---------------------------------------------------------------------------------------------

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        outermost = len(self._current) == 1
        self._current.append(stream)
        try:
            with _Direct(self) if outermost else nullcontext():
                yield
        finally:
            self._current.pop()

    def launch(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if self._graph is None:
                self.enqueue(call.name, call.step)
            else:
                self._label = call.name
                call.step()

    def opaque(self, run: Callable[[], Any]) -> Any:
        if self._busy:
            return run()
        if self._graph is None:
            self.finish(self._current[-1])
        else:
            self._graph.add(self._label, self._current[-1], _Node(run, []))
        with self._running():
            return run()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._graph is None:
            self.enqueue("copy", partial(target.copy_, source))
        else:
            target.copy_(source)

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        self.forbid("pinned memory")
        with self._running():
            made = torch.empty(like.shape, dtype=like.dtype)
        self._pinned = {key: held for key, held in self._pinned.items() if not held.expired()}
        self._pinned[storage_key(made)] = StorageWeakRef(made.untyped_storage())
        return made

    def record(self, *, timing: bool = False) -> FakeEvent:
        event = FakeEvent(self, self._current[-1])
        if self._graph is None:
            self._put(event)
        else:
            self._graph.record(event)
        return event

    def wait(self, event: FakeEvent) -> None:
        if self._graph is None:
            self._put(_Work("wait", None, event))
        else:
            self._graph.wait(self._current[-1], event)

    def pool(self) -> Pool:
        return FakePool()

    @contextmanager
    def capture(self, pool: Pool) -> Iterator[FakeGraph]:
        self.synchronize()
        if pool.used and not pool.graphs:
            raise RuntimeError("device error: the pool is gone with the last graph that had memory of it")
        pool.used, pool.graphs = True, pool.graphs + 1
        graph = self._graph = FakeGraph(self, pool)
        try:
            with _HostReads(self):
                yield graph
            with self._running():
                graph.end()
        except BaseException:
            graph.reset()
            raise
        finally:
            self._graph = None

    def memory(self) -> tuple[int, int]:
        if self._budget is None:
            return HostMemory().total_free() or (UNTOLD, UNTOLD)
        return self._budget, self._budget - self.reserved()

    def reserved(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(nbytes for _, nbytes in self._made.values())

    def release(self) -> None:
        """Nothing is kept that is not in use."""

    def synchronize(self) -> None:
        self.forbid("synchronize")
        for stream in (self.main, self.side):
            self.finish(stream)

    # ---- what tests do to it -----------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Let the next work fail with `error`, and the device with it for good."""
        self.main.queue.appendleft(_Work("failure", partial(_raise, error)))

    def hang(self) -> None:
        """Let no stream get on any more, as when a peer is gone."""
        self._hangs = True

    def forbid(self, what: str) -> None:
        """Raises RuntimeError while a graph is captured."""
        if self._graph is not None:
            raise _illegal(what)

    # ---- queues ------------------------------------------------------------------------------------------------

    def enqueue(self, name: str, run: Callable[[], Any]) -> None:
        """Give the current stream some work; work that makes calls of its own runs them at once."""
        if self._busy:
            run()
        else:
            self._put(_Work(name, run))

    def _put(self, item: _Work | FakeEvent) -> None:
        if self.failure is not None:
            raise self.failure
        self._current[-1].queue.append(item)
        self._hurry()

    def _hurry(self) -> None:
        """Let the streams that are not lazy run as far as their waits permit."""
        for stream in (self.main, self.side):
            while not self._hangs and stream.name not in self._lazy and stream.queue and not _blocked(stream.queue[0]):
                self._pop(stream)

    def turn(self, stream: FakeStream) -> None:
        """Run one piece of work that `stream` needs next."""
        if self.failure is not None:
            raise self.failure
        while stream.queue and not self._hangs:
            head = stream.queue[0]
            if not _blocked(head):
                self._pop(stream)
                return
            assert isinstance(head, _Work) and head.event is not None
            stream = head.event.stream

    def reach(self, event: FakeEvent) -> None:
        """Run what has to run before `event` passes."""
        while not event.passed:
            if self._hangs or not event.stream.queue:
                raise RuntimeError("device error: waiting for ever for a stream that does not get on")
            self.turn(event.stream)
        if self.failure is not None:
            raise self.failure

    def finish(self, stream: FakeStream) -> None:
        """Run all work of a stream."""
        if self.failure is not None:
            raise self.failure
        if stream.queue:
            last = FakeEvent(self, stream)
            stream.queue.append(last)
            self.reach(last)

    def _pop(self, stream: FakeStream) -> None:
        item = stream.queue.popleft()
        if isinstance(item, FakeEvent):
            item.passed_at = time.perf_counter()
            self._hurry()
        elif item.run is not None:
            self.ran.append(item.name)
            try:
                with self._running(), torch.inference_mode():
                    item.run()
            except BaseException as error:
                self.failure = error
                raise

    @contextmanager
    def _running(self) -> Iterator[None]:
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    # ---- what torch computes directly --------------------------------------------------------------------------

    @property
    def capturing(self) -> bool:
        return self._graph is not None and not self._busy

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that was called inside `on`: after the stream's earlier work, or captured."""
        if self._busy:
            return self._counted(func(*args, **kwargs))
        if self._graph is None:
            of_host = storage_keys(tensors_in((args, kwargs))) <= self._pinned.keys()
            if func._schema.name.removeprefix("aten::") not in SHAPING and not of_host:
                self.finish(self._current[-1])
            return self._counted(func(*args, **kwargs))
        self._refuse(func, args, kwargs)
        result = self._counted(func(*args, **kwargs))
        given = tensors_in((args, kwargs))
        known = storage_keys(given)
        fresh = [None if storage_key(tensor) in known else tensor for tensor in tensors_in(result)]
        if func._schema.is_mutable or any(tensor is not None for tensor in fresh):
            node = _Node(partial(func, *args, **kwargs), given, fresh)
            self._graph.add(self._label or str(func), self._current[-1], node)
        return result

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raises RuntimeError for an operator that a device cannot capture."""
        name = func._schema.name.removeprefix("aten::")
        if name in SYNCHRONIZING and not (func._overloadname == "self_int" or "output_size" in kwargs):
            raise _illegal(f"{func} waits for values")
        if name == "index" and any(tensor.dtype == torch.bool for tensor in tensors_in(args[1])):
            raise _illegal(f"{func} with a mask waits for values")
        if name == "lift_fresh" and not self.assigns:
            raise _illegal(f"{func} makes a tensor of values of the host")
        if kwargs.get("pin_memory"):
            raise _illegal(f"{func} of pinned memory")

    def _counted(self, result: Any) -> Any:
        """Charge fresh memory to the budget."""
        if self._budget is None:
            return result
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage_key(tensor) not in self._made or self._made[storage_key(tensor)][0].expired():
                self._made[storage_key(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        if self.reserved() > self._budget:
            raise torch.OutOfMemoryError(f"device error: cannot allocate, {self._budget} bytes are all there is")
        return result


class _Direct(TorchDispatchMode):
    """Hands every operator that torch runs to the device."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.compute(func, args, kwargs or {})


class _HostReads(TorchFunctionMode):
    """Refuses reads of values by the host, which no operator tells of where host and device are one."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(func, "__name__", ""), [*args[1:], *(kwargs or {}).values()]
        to_host = name == "to" and any(isinstance(item, str) and item == "cpu" for item in given)
        if self._device.capturing and (name in READING or to_host):
            raise _illegal(f"Tensor.{name}")
        self._device.assigns = name == "__setitem__"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._device.assigns = False


def _illegal(what: str) -> RuntimeError:
    return RuntimeError(f"device error: operation not permitted when stream is capturing: {what}")


def _blocked(item: _Work | FakeEvent) -> bool:
    return isinstance(item, _Work) and item.event is not None and not item.event.passed


def _raise(error: BaseException) -> None:
    raise error
