"""Counts the bytes that parameters need and says so, early and in words, when they do not fit.

Knows no device: what is free is passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Final

from lineshaft.errors import OutOfMemory
from lineshaft_contract.ops.quantize import BLOCK_SCHEMES, LINEAR_SCHEMES, NONE, quantized_bytes
from lineshaft_contract.schemes import as_dtype
from lineshaft_contract.weights import Param

_GIB: Final = 1 << 30


def local_bytes(params: Iterable[Param], layouts: Mapping[str, str]) -> int:
    """Bytes that the local shards take in their executed dtypes, or quantized. `layouts` is the packing of each, by
    Param name; one without a packing is kept in its dtype, and quantized by the kernel that uses it.

    Parameters with one `source_id` share memory, and count once, where packing, shape and dtype are equal too.
    """
    return sum(sum(_prepared(group, layouts).values()) for group in _by_source(params).values())


def repacked(params: Iterable[Param], layouts: Mapping[str, str]) -> list[str]:
    """For each source that takes memory in several packings: whose it is, which they are, and what that adds."""
    lines = []
    for group in _by_source(params).values():
        prepared = _prepared(group, layouts)
        if len(prepared) > 1:
            extra = sum(prepared.values()) - max(prepared.values())
            names = " and ".join(param.name for param in group)
            packings = ", ".join(layout for layout, _, _ in prepared)
            lines.append(f"{names} hold one tensor in {len(prepared)} packings: {packings} (+{gib(extra)})")
    return lines


def _by_source(params: Iterable[Param]) -> dict[str, list[Param]]:
    groups: dict[str, list[Param]] = {}
    for param in params:
        groups.setdefault(param.source_id, []).append(param)
    return groups


def _prepared(group: Iterable[Param], layouts: Mapping[str, str]) -> dict[tuple[str, tuple[int, ...], str], int]:
    """Bytes of each distinct (layout, shape, dtype) among parameters of one source."""
    return {
        (layouts.get(param.name, ""), param.shape, param.dtype): _bytes(param, layouts.get(param.name, ""))
        for param in group
    }


def _bytes(param: Param, layout: str) -> int:
    if layout and param.scheme != NONE:
        group_size: int = getattr(param.problems["linear"], "group_size", 0)
        return quantized_bytes(prod(param.shape[:-1]), param.shape[-1], group_size, param.scheme)
    return prod(param.shape) * as_dtype(param.dtype).itemsize


def quantized(params: Iterable[Param], layouts: Mapping[str, str]) -> list[str]:
    """For each scheme, how many weights it quantizes, and the memory they take with it and without."""
    held, lines = list(params), []
    for scheme in (*LINEAR_SCHEMES, *BLOCK_SCHEMES):
        group = [param for param in held if param.scheme == scheme]
        if group:
            sizes = f"{gib(local_bytes(group, layouts))}, {gib(local_bytes(group, {}))} without"
            lines.append(f"{len(group)} weights are quantized to {scheme}: {sizes}")
    return lines


def breakdown(parts: Mapping[str, int]) -> str:
    """`parts` (bytes by name) as "weights 1.50 GiB + caches 0.25 GiB"."""
    return " + ".join(f"{name} {gib(size)}" for name, size in parts.items())


def gib(size: int) -> str:
    """Bytes as "1.50 GiB"; below 1 MiB in bytes."""
    return f"{size / _GIB:.2f} GiB" if size >= 1 << 20 else f"{size} bytes"


def check_fits(parts: Mapping[str, int], free: int | None) -> None:
    """Raise OutOfMemory if `parts` (bytes by name) are together more than `free`. `free` None means that nobody knows:
    no check."""
    need = sum(parts.values())
    if free is None or need <= free:
        return
    raise OutOfMemory(
        f"{breakdown(parts)} need {gib(need)} but {gib(free)} are free: {gib(need - free)} too much; use a smaller or "
        "more strongly quantized model, more devices (tp), a shorter context, fewer pages or tokens a step "
        "(scheduler.token_budget), or free memory on the device"
    )
