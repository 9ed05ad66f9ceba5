"""What the machine could do at best, measured: reads of memory, and a matrix product in the library that is at hand."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

READ_BYTES = 256 << 20
"""More than any cache holds."""
GEMM = (1024, 2048, 2048)
TIMES = 5


@dataclass(frozen=True)
class Bounds:
    """Bytes per second of reading, FLOP/s of a product in `dtype`, and by what that was computed."""

    read_bytes_per_s: float
    flops_per_s: float
    dtype: str
    library: str
    threads: int


def measure(threads: int, dtype: str) -> Bounds:
    """The best of several runs with so many threads; takes about a second."""
    m, n, k = GEMM
    product, library = gemm(threads, dtype)
    return Bounds(READ_BYTES / best(reading(threads)), 2 * m * n * k / best(product), dtype, library, threads)


def best(run: Callable[[], object]) -> float:
    """Seconds of the quickest of several runs."""
    times = []
    for _ in range(TIMES):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def reading(threads: int) -> Callable[[], object]:
    """Adds up a large array, a part in each thread."""
    parts = [np.ones(READ_BYTES // 8 // threads, np.int64) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.sum, parts))


def gemm(threads: int, dtype: str) -> tuple[Callable[[], object], str]:
    """A product in a library that the backend has loaded, else in NumPy, whose threads its own variables set."""
    m, n, k = GEMM
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        x, w = torch.ones(m, k, dtype=kind), torch.ones(n, k, dtype=kind)
        return (lambda: torch.nn.functional.linear(x, w)), "torch"
    jax: Any = sys.modules.get("jax")
    if jax is not None:
        x, w = jax.numpy.ones((m, k), dtype), jax.numpy.ones((k, n), dtype)
        return (lambda: jax.block_until_ready(x @ w)), "jax"
    x, w = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
    return (lambda: x @ w), "numpy in float32"
