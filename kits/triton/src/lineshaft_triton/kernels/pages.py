"""Moving pages and slots of a cache of the "slots" layout, as the bytes that they are: to an array, from one, and
within the cache, where all reads come before all writes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.kernels.cache import consuming
from lineshaft_torch.pages import SLOTS_LAYOUT, page_view
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.kernels.rowwise import gapless
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import Target

UNITS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""What is moved at a time: the widest that a row consists of."""
VALUES = 4096
"""Units that a program holds."""
INTERPRETED_VALUES = 1 << 20
MOST = 1024
"""Pages of a copy within the cache: a program holds its part of all of them before it writes any."""

Arrays = Mapping[str, torch.Tensor]


@triton.jit
def move_kernel(
    to_ptr, from_ptr, dst_ptr, src_ptr, count, width, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Row src[i] (GATHER; else i) of `from` to row dst[i] (SCATTER; else i) of `to`, for i below count. With both, the
    two may be the same array: one program has all rows. Both dims are in the grid's first, as CUDA allows others no
    more than 65535."""
    columns = tl.cdiv(width, BLOCK_W)
    row = tl.program_id(0) // columns * BLOCK_R + tl.arange(0, BLOCK_R)
    at = tl.program_id(0) % columns * BLOCK_W + tl.arange(0, BLOCK_W)
    there = row < count
    inside = there[:, None] & (at < width)[None, :]
    source, target = row.to(tl.int64), row.to(tl.int64)
    if GATHER:
        source = tl.load(src_ptr + row, there, 0).to(tl.int64)
    if SCATTER:
        target = tl.load(dst_ptr + row, there, 0).to(tl.int64)
    moved = tl.load(from_ptr + source[:, None] * width + at[None, :], inside, 0)
    if GATHER and SCATTER:
        tl.debug_barrier()  # other threads read what this one writes
    tl.store(to_ptr + target[:, None] * width + at[None, :], moved, inside)


def config(count: int, width: int, together: bool) -> Config:
    """`together`: one program takes all rows."""
    values = INTERPRETED_VALUES if interpreting() else VALUES
    rows = triton.next_power_of_2(max(count, 1))
    block_w = min(triton.next_power_of_2(max(width, 1)), max(values // rows, 1) if together else values)
    block_r = rows if together else min(rows, max(values // block_w, 1))
    return Config({"BLOCK_R": block_r, "BLOCK_W": block_w}, num_warps=4, num_stages=1)


def in_units(array: torch.Tensor) -> torch.Tensor:
    """[n, ...] as integers [n, units], of the widest kind."""
    flat = array.contiguous().view(array.shape[0], -1).view(torch.uint8)
    unit = next(unit for unit in UNITS if flat.shape[1] % unit.itemsize == 0)
    return flat.view(unit)


def move(
    session: Any,
    to: torch.Tensor,
    source: torch.Tensor,
    *,
    dst: torch.Tensor | None = None,
    src: torch.Tensor | None = None,
) -> None:
    """Rows `src` of `source` (all, in order) to rows `dst` of `to` (all, in order); both arrays are dense."""
    to, source = in_units(to), in_units(source)
    places, rows = (None if ids is None else gapless(ids) for ids in (dst, src))
    given = rows if places is None else places
    assert given is not None
    count, width = given.shape[0], to.shape[1]
    chosen = config(count, width, together=dst is not None and src is not None)
    programs = triton.cdiv(count, chosen.block["BLOCK_R"]) * triton.cdiv(width, chosen.block["BLOCK_W"])
    launch(
        session, move_kernel, (programs,), chosen, to, source, given,
        given if rows is None else rows, count, width, GATHER=src is not None, SCATTER=dst is not None,
    )  # fmt: skip


def supports_copy(problem: KVProblem) -> str | None:
    if problem.rows > MOST:
        return f"reads all pages before it writes any, and holds at most {MOST}, not {problem.rows}"
    return None


def bind_read(problem: KVProblem, session: Any) -> Any:
    def read_pages(cache: Cache, ids: torch.Tensor, *, out: Any = None) -> Any:
        """ids int32[n] -> k [n, page, Hkv, D] and whatever else the cache has, in its order."""
        arrays = page_view(cache).values()
        found = (out if isinstance(out, tuple) else (out,)) if out is not None else tuple(
            torch.empty((ids.shape[0], *array.shape[1:]), dtype=array.dtype, device=array.device) for array in arrays
        )  # fmt: skip
        for target, array in zip(found, arrays, strict=True):
            move(session, target, array, src=ids)
        return found if len(found) > 1 else found[0]

    return read_pages


def bind_put(problem: KVProblem, session: Any) -> Any:
    def write_pages(known: KVProblem, cache: Cache, ids: torch.Tensor, pages: Arrays) -> Cache:
        """pages {name: [n, page, ...]} -> the cache with them at ids int32[n]."""
        for name, array in page_view(cache).items():
            move(session, array, pages[name], dst=ids)
        return cache

    return consuming(write_pages)(problem, session)


def bind_copy(by_page: bool, problem: KVProblem, session: Any) -> Any:
    def copy(known: KVProblem, cache: Cache, src: torch.Tensor, dst: torch.Tensor) -> Cache:
        """The cache with page (slot) src[i] at dst[i]; all reads come before all writes."""
        for array in (page_view(cache) if by_page else cache.arrays).values():
            move(session, array, array, src=src, dst=dst)
        return cache

    return consuming(copy)(problem, session)


def recipes(where: Target) -> list[Recipe]:
    common: dict[str, Any] = {
        "layout": SLOTS_LAYOUT, "priority": TRITON, "handles": frozenset({"kv_scheme"}),
        "options": {"target": where.name},
    }  # fmt: skip
    copies = {"copy_pages": partial(bind_copy, True), "copy_slots": partial(bind_copy, False)}
    return [
        recipe("triton_read_pages", "read_pages", bind_read, out=True, **common),
        recipe("triton_write_pages", "write_pages", bind_put, **common),
        *(recipe(f"triton_{op}", op, bind, supports=supports_copy, **common) for op, bind in copies.items()),
    ]
