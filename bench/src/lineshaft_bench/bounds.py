"""What the machine could do at best, measured: reads of memory, and arithmetic in registers or in a library's product.

The loops are the CPU backend's where its native library is installed; else NumPy reads, and the library computes that
the engine's backend uses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

LEAST_BYTES, MOST_BYTES = 64 << 20, 1 << 30
"""Reading less measures how threads begin; more than any cache holds is read as fast as this much."""
GEMM = (1024, 2048, 2048)
TIMES = 7
ARITHMETIC_S = 0.01
OF_CODES = {"w8a8_int8": "int8"}
"""What is multiplied where inputs of linear layers are quantized too."""


@dataclass(frozen=True)
class Bounds:
    """Of one moment: bytes per second of reading, operations per second on `dtype`, and by what these were done."""

    read_bytes_per_s: float
    flops_per_s: float
    dtype: str
    library: str
    threads: int


@dataclass(frozen=True)
class Loops:
    """How to measure: `read` gives the seconds of reading `size` bytes once, `compute` gives operations per second."""

    size: int
    read: Callable[[], float]
    compute: Callable[[], float]
    dtype: str
    library: str
    threads: int

    def measure(self) -> Bounds:
        """Medians of a few runs of each, taken in turns; takes a fraction of a second."""
        runs = [(self.read(), self.compute()) for _ in range(TIMES)]
        read, computed = (statistics.median(values) for values in zip(*runs, strict=True))
        return Bounds(self.size / read, computed, self.dtype, self.library, self.threads)


def loops(threads: int, dtype: str, quantization: str = "none", size: int = LEAST_BYTES, library: str = "") -> Loops:
    """Loops over so many threads, which read `size` bytes within LEAST_BYTES and MOST_BYTES. `library` is the module
    that the engine computes with, for a machine without native loops; "" takes NumPy."""
    data = np.ones(min(max(size, LEAST_BYTES), MOST_BYTES), np.uint8)
    found = native_loops(threads, OF_CODES.get(quantization, dtype), data)
    if found is not None:
        return found
    product, said = gemm(threads, dtype, library)
    m, n, k = GEMM
    read = reading(data, threads)
    return Loops(data.nbytes, lambda: seconds(read), lambda: 2 * m * n * k / seconds(product), dtype, said, threads)


def native_loops(threads: int, dtype: str, data: np.ndarray[Any, Any]) -> Loops | None:
    """Those of the CPU backend, or None where it is not installed, has no native library, or does not know `dtype`."""
    try:
        from lineshaft_cpu import bounds, native
    except ImportError:
        return None
    if native.reason() or dtype not in bounds.KINDS:
        return None
    level = native.load()
    how = bounds.arithmetic(level, dtype, threads, ARITHMETIC_S)[1]
    return Loops(
        data.nbytes,
        lambda: bounds.read_seconds(level, data, threads),
        lambda: bounds.arithmetic(level, dtype, threads, ARITHMETIC_S)[0],
        dtype, f"native {level.level}, {how}", threads,
    )  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def reading(data: np.ndarray[Any, Any], threads: int) -> Callable[[], object]:
    """Takes the largest of an array, a part in each thread."""
    parts = np.array_split(data[: data.nbytes // 8 * 8].view(np.int64), threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.max, parts))


def gemm(threads: int, dtype: str, library: str) -> tuple[Callable[[], object], str]:
    """A product in a library, and its name; in NumPy, whose threads its own variables set, the product is float32's."""
    m, n, k = GEMM
    made: Any = import_module(library or "numpy")
    if library == "torch":
        made.set_num_threads(threads)
        kind = getattr(made, dtype)
        x, w = made.ones(m, k, dtype=kind), made.ones(n, k, dtype=kind)
        return (lambda: made.nn.functional.linear(x, w)), library
    if library == "jax":
        x, w = made.numpy.ones((m, k), dtype), made.numpy.ones((k, n), dtype)
        return (lambda: made.block_until_ready(x @ w)), library
    x, w = made.ones((m, k), made.float32), made.ones((k, n), made.float32)
    return (lambda: x @ w), "numpy in float32"
