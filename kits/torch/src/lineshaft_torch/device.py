"""What a session needs of a device beyond tensors: streams, events, graphs, pinned memory. Knows no program.

`TorchDevice` is any device behind `torch.cuda`, which is HIP too; `lineshaft_torch.fake` has one without hardware.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch

from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import UncountedMemory

Stream = Any
"""A queue of a device: its work runs in order. Opaque; it belongs to the layer that has it."""

Pool = Any
"""Where graphs take the memory of their temporaries from; those of one pool never run at the same time."""


class Call(Protocol):
    """A call with all its arguments, and what to call it in messages."""

    @property
    def name(self) -> str: ...

    @property
    def step(self) -> Callable[[], Any]: ...


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the device has passed it. Raises what the device has failed with."""
        ...

    def synchronize(self) -> None:
        """Wait for it. Raises what the device has failed with."""
        ...

    def seconds_until(self, later: Any) -> float:
        """Device time between two passed events of one layer, both recorded with `timing`."""
        ...


class Graph(Protocol):
    """Captured work, over fixed addresses."""

    def replay(self) -> None:
        """Enqueue it on the current stream."""
        ...

    def reset(self) -> None:
        """Free it; it must not run any more."""
        ...


class DeviceLayer(Protocol):
    """One device as one session sees it.

    `main` is the stream of everything, `side` that of collectives which overlap with it. The current stream is that of
    the innermost `on`; what torch computes in there is enqueued on it, and on real devices so is what kernels launch.
    """

    device: torch.device
    main: Stream
    side: Stream
    granule: int
    """Memory of a large tensor is taken in multiples of this many bytes."""

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Make this the thread's device and `stream` its current stream."""
        ...

    def launch(self, calls: Sequence[Call]) -> None:
        """Make the calls, whose work goes to the current stream."""
        ...

    def opaque(self, run: Callable[[], Any]) -> Any:
        """Run what computes by other means than torch's operators, and return its result."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy; one of both may be pinned host memory, which is in use until an event after it has passed."""
        ...

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        """Uninitialized pinned host memory for a copy of `like`."""
        ...

    def record(self, *, timing: bool = False) -> Event:
        """An event after all that the current stream has been given."""
        ...

    def wait(self, event: Any) -> None:
        """Let what the current stream is given from now on start after `event`. The host does not wait."""
        ...

    def pool(self) -> Pool: ...

    def capture(self, pool: Pool) -> AbstractContextManager[Graph]:
        """Capture what is launched inside, on the current stream and on others that fork from it and join it again."""
        ...

    def memory(self) -> tuple[int, int]:
        """(total, free) bytes; what torch has reserved and does not use is free."""
        ...

    def reserved(self) -> int:
        """Bytes taken from the device, whether in use or not."""
        ...

    def release(self) -> None:
        """Give reserved memory that is not in use back to the device."""
        ...

    def synchronize(self) -> None:
        """Wait for all streams. Raises what the device has failed with."""
        ...


class LayerMemory(UncountedMemory):
    """The `Memory` of a backend whose device stands behind a layer."""

    def __init__(self, layer: DeviceLayer) -> None:
        self._layer = layer

    def total_free(self) -> tuple[int, int] | None:
        return self._layer.memory()

    def page_bytes(self, problem: KVProblem) -> int:
        return problem.page_bytes

    def synchronize(self) -> None:
        self._layer.synchronize()


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from collecting garbage: to free a device's memory or graphs is illegal while it captures."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class TorchEvent:
    """An Event over `torch.cuda.Event`."""

    def __init__(self, timing: bool) -> None:
        self.event = torch.cuda.Event(enable_timing=timing)

    def query(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_until(self, later: TorchEvent) -> float:
        return float(self.event.elapsed_time(later.event)) / 1e3


class TorchDevice:
    """The DeviceLayer of device number `index` behind `torch.cuda`. Making one starts the device's runtime."""

    granule = 2 << 20  # of torch's caching allocator

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.main, self.side = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        return torch.cuda.stream(stream)  # switches the device too

    def launch(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call.step()

    def opaque(self, run: Callable[[], Any]) -> Any:
        return run()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def record(self, *, timing: bool = False) -> TorchEvent:
        made = TorchEvent(timing)
        made.event.record()
        return made

    def wait(self, event: TorchEvent) -> None:
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def pool(self) -> Pool:
        return torch.cuda.graph_pool_handle()

    @contextmanager
    def capture(self, pool: Pool) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        with uncollected():
            # Other threads, such as those that watch process groups, may call the driver meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield graph
            except BaseException:
                with suppress(RuntimeError):  # it says once more that the capture has failed
                    graph.capture_end()
                raise
            graph.capture_end()

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        return total, free + self.reserved() - torch.cuda.memory_allocated(self.device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
