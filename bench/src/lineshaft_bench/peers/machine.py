"""Chooses how the machine is measured: by the CPU backend's loops in C where they are, else by what is at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lineshaft_bench.bounds import Loops

LEAST_BYTES, MOST_BYTES = 64 << 20, 1 << 30
"""Reading less measures how threads begin; more than any cache holds is read as fast as this much."""
ARITHMETIC_S = 0.01
GEMM = (1024, 2048, 2048)
OF_CODES = {"w8a8_int8": "int8"}
"""What is multiplied where inputs of linear layers are quantized too."""


def loops(threads: int, dtype: str, quantization: str = "none", size: int = LEAST_BYTES, library: str = "") -> Loops:
    """Loops over so many threads, which read `size` bytes within LEAST_BYTES and MOST_BYTES. `library` is the module
    that the engine computes with, for a machine without native loops; "" takes NumPy."""
    data = np.ones(min(max(size, LEAST_BYTES), MOST_BYTES), np.uint8)
    found = native_loops(threads, OF_CODES.get(quantization, dtype), data)
    return found or library_loops(threads, dtype, data, library)


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


def library_loops(threads: int, dtype: str, data: np.ndarray[Any, Any], library: str) -> Loops:
    """NumPy reads `data`, and the module `library` computes a large product, or NumPy where it is ""."""
    product, said = gemm(threads, dtype, library)
    m, n, k = GEMM
    read = reading(data, threads)
    return Loops(data.nbytes, lambda: seconds(read), lambda: 2 * m * n * k / seconds(product), dtype, said, threads)


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
    if library == "torch":
        import torch

        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        x, w = torch.ones(m, k, dtype=kind), torch.ones(n, k, dtype=kind)
        return (lambda: torch.nn.functional.linear(x, w)), library
    if library == "jax":
        import jax

        left, right = jax.numpy.ones((m, k), dtype), jax.numpy.ones((k, n), dtype)
        return (lambda: jax.block_until_ready(left @ right)), library
    plain, other = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
    return (lambda: plain @ other), "numpy in float32"
