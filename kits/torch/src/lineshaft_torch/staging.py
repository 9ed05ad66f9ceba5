"""Values on their way from the host to a device, through pinned memory that is used in turns. Knows no step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from lineshaft_torch.arrays import HostArray, from_host, host_view
from lineshaft_torch.device import DeviceLayer, Event


class Staging(Protocol):
    """The way of values to one tensor."""

    def upload(self, values: HostArray) -> None:
        """Let the tensor become `values`, of its dtype and number of elements, for all that is submitted from now on;
        they are free again when this returns."""
        ...


class DirectStaging:
    """Of a tensor in host memory."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def upload(self, values: HostArray) -> None:
        self._target.copy_(from_host(values).view(self._target.shape))


class PinnedStaging:
    """Of a tensor on a device, on the current stream. The host waits, by `reach`, only when all `depth` pinned buffers
    are still being read."""

    def __init__(self, layer: DeviceLayer, target: torch.Tensor, depth: int, reach: Callable[[Event], None]) -> None:
        self._layer, self._target, self._reach = layer, target, reach
        self._buffers = [layer.pinned(target) for _ in range(depth)]
        self._read: list[Event | None] = [None] * depth
        self._next = 0

    def upload(self, values: HostArray) -> None:
        at, self._next = self._next, (self._next + 1) % len(self._buffers)
        read = self._read[at]
        if read is not None:
            self._reach(read)
        host_view(self._buffers[at]).reshape(-1)[:] = values.reshape(-1)
        self._layer.copy(self._target, self._buffers[at])
        self._read[at] = self._layer.record()
