"""What this processor could do at best, measured by the loops of `native/bounds.c`; it imports no PyTorch."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

import numpy as np

from lineshaft_contract.errors import Unsupported
from lineshaft_cpu.native import Native

KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""Numbers that `arithmetic` multiplies, as `bounds.c` counts them."""
HOW_BYTES = 32


def read_seconds(native: Native, data: np.ndarray[Any, Any], threads: int) -> float:
    """Seconds of reading all of `data` once, a contiguous part in each thread. Raises `Unsupported` for threads that
    cannot be had."""
    run = native.function("bound_read", c_void_p, c_int64, c_int, c_void_p)
    seconds = c_double()
    run(data.ctypes.data, data.nbytes, threads, ctypes.addressof(seconds))
    if seconds.value < 0:
        raise Unsupported(f"{threads} threads cannot be had; give fewer, at least 1 (--threads)")
    return seconds.value


def arithmetic(native: Native, dtype: str, threads: int, seconds: float) -> tuple[float, str]:
    """Operations per second in registers, measured for about so many seconds, and the instructions that did them.

    A multiplication and an addition are two operations. `dtype` is one of KINDS: the type of the factors, or float32
    where the level has no instruction for bfloat16. Raises `Unsupported` for another dtype, and for threads that cannot
    be had.
    """
    if dtype not in KINDS:
        raise Unsupported(f"no loop measures arithmetic in {dtype}, only in {', '.join(KINDS)}")
    run = native.function("bound_arithmetic", c_int, c_int, c_double, c_void_p, ctypes.c_char_p)
    found, how = c_double(), ctypes.create_string_buffer(HOW_BYTES)
    run(KINDS[dtype], threads, seconds, ctypes.addressof(found), how)
    if found.value < 0:
        raise Unsupported(f"{threads} threads cannot be had; give fewer, at least 1 (--threads)")
    return found.value, how.value.decode()
