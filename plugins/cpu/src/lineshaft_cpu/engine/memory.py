"""Memory of the engine: on huge pages where the system has them, and an error with a type where there is none."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from lineshaft_contract.errors import OutOfMemory
from lineshaft_contract.ops.spec import HostArray, numpy_dtype

HUGE = 2 << 20
"""Bytes of a huge page."""
ALIGNMENT = 128
BLOCK = 32 * HUGE


@contextmanager
def typed_memory(what: str) -> Iterator[None]:
    """Turn a failed allocation into OutOfMemory."""
    try:
        yield
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise OutOfMemory(
            f"no memory for {what} ({error}); use fewer pages, fewer tokens a step, a smaller model or a narrower dtype"
        ) from error


class Region:
    """Arrays out of large blocks, one after another; several threads may take some. A block is freed with the last
    array that lies in it."""

    def __init__(self) -> None:
        self._block: HostArray = np.empty(0, np.uint8)
        self._used = 0
        self._blocks: list[range] = []  # the addresses of each
        self._lock = threading.Lock()

    def zeros(self, shape: Sequence[int], dtype: str) -> HostArray:
        """A zeroed, aligned array. Raises MemoryError or OSError."""
        kind = numpy_dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        with self._lock:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            if start + nbytes > self._block.nbytes:
                self._block, start = pages(max(BLOCK, nbytes)), 0
                self._blocks.append(range(self._block.ctypes.data, self._block.ctypes.data + self._block.nbytes))
            self._used = start + nbytes
            raw: Any = self._block[start : start + nbytes]
        array: HostArray = raw.view(kind).reshape(tuple(shape))
        return array

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Let `room` give the calling thread arrays of this region."""
        _filled.region = self
        try:
            yield
        finally:
            _filled.region = None

    def keep(self, array: HostArray) -> HostArray:
        """The array, copied unless it lies in this region."""
        if any(array.ctypes.data in block for block in self._blocks):
            return array
        made = self.zeros(array.shape, array.dtype.name)
        made[...] = array
        return made


_filled = threading.local()


def room(shape: Sequence[int], dtype: str) -> HostArray:
    """Zeros for a packed weight to be written to: in the region that the calling thread fills, else by themselves."""
    region: Region | None = getattr(_filled, "region", None)
    return np.zeros(tuple(shape), numpy_dtype(dtype)) if region is None else region.zeros(shape, dtype)


@contextmanager
def helpers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of Python for work that is done once. Raises OutOfMemory where the system gives none."""
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise OutOfMemory(no_threads(threads)) from error


def no_threads(threads: int) -> str:
    """What is wrong where the system gives fewer threads than these, and what to do."""
    return (
        f"the system gives no team of {threads} threads (process {os.getpid()}); set threads to fewer, or raise the "
        "limit of processes (`ulimit -u`)"
    )


def touch(arrays: Iterable[HostArray], threads: int) -> None:
    """Clear the first byte of each array: the system clears a huge page when it is first used, and a step should not
    wait for that."""
    with helpers(threads) as pool:
        list(pool.map(lambda array: ctypes.memset(array.ctypes.data, 0, min(1, array.nbytes)), arrays))


def pages(nbytes: int) -> HostArray:
    """Zeroed bytes, uint8[at least `nbytes`], from the start of a huge page where there are some."""
    whole = -(-max(1, nbytes) // HUGE) * HUGE
    if whole >= 1 << 62:
        raise MemoryError(f"{nbytes} bytes")
    mapped = mmap.mmap(-1, whole + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system that has no such pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    found = np.frombuffer(mapped, np.uint8)
    start = -found.ctypes.data % HUGE
    return found[start : start + whole]
