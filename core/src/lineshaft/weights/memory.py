"""Counts the bytes that parameters need and says so, early and in words, when they do not fit.

Knows no device: what is free is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Final

from lineshaft.contract.weights import Param
from lineshaft.errors import OutOfMemory
from lineshaft.weights.schemes import as_dtype

_GIB: Final = 1 << 30


def local_bytes(params: Iterable[Param]) -> int:
    """Bytes that the local shards take in their executed dtypes; parameters with one `source_id` count once."""
    largest: dict[str, int] = {}
    for param in params:
        size = prod(param.shape) * as_dtype(param.dtype).itemsize
        largest[param.source_id] = max(size, largest.get(param.source_id, 0))
    return sum(largest.values())


def breakdown(parts: Mapping[str, int]) -> str:
    """`parts` (bytes by name) as "weights 1.50 GiB + caches 0.25 GiB"."""
    return " + ".join(f"{name} {gib(size)}" for name, size in parts.items())


def gib(size: int) -> str:
    """Bytes as "1.50 GiB"; below 1 MiB in bytes."""
    return f"{size / _GIB:.2f} GiB" if size >= 1 << 20 else f"{size} bytes"


def check_fits(need: int, free: int | None, what: str) -> None:
    """Raise OutOfMemory if `need` bytes are more than `free`. `free` None means that nobody knows: no check.

    `what` says what the bytes are for, such as `breakdown(...)`.
    """
    if free is None or need <= free:
        return
    raise OutOfMemory(
        f"{what} need {gib(need)} but {gib(free)} are free: {gib(need - free)} too much; use a smaller or more "
        "strongly quantized model, more devices (tp), a shorter context or fewer pages, or free memory on the device"
    )
