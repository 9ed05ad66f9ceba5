"""What the engine's kernels share: recipes, rows of strided arrays, and the fields that all jobs begin with."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

from lineshaft_contract.binding import DENSE, Recipe
from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import Problem
from lineshaft_contract.weights import Weight
from lineshaft_cpu.engine.arrays import TapeArray
from lineshaft_cpu.engine.tape import Field, Job, Tape
from lineshaft_cpu.priority import NATIVE

DTYPES = ("bfloat16", "float32")
GRAIN = 16384
"""Values of an item of work on rows: fewer cost more to hand out than to compute."""

EXTENT = (("live", c_void_p), ("rows", c_int64), ("times", c_int64))
"""Of every job: how many rows there are now."""
LOOKUP = Job(
    "lookup",
    (
        *EXTENT, ("grain", c_int64), ("from", c_void_p), ("to", c_void_p), ("index", c_void_p), ("first", c_void_p),
        *((name, c_int64) for name in ("count", "bytes", "to_stride", "from_stride", "inner", "inner_stride")),
        ("scaled", c_int64), ("narrow", c_int64), ("scale", c_double),
    ),
)  # fmt: skip

__all__ = [
    "DENSE", "DTYPES", "EXTENT", "Field", "Job", "Recipe", "Tape", "TapeArray", "c_double", "c_float", "c_int",
    "c_int32", "c_int64", "c_void_p", "copied", "dense", "extent", "floats_only", "grain", "live_of", "lookup",
    "narrow", "operand", "recipe",
]  # fmt: skip


def recipe(
    name: str,
    op: str,
    bind: Callable[[Any, Any], Callable[..., Any]],
    supports: Callable[[Any], str | None] | None = None,
    priority: int = NATIVE,
    **fields: Any,
) -> Recipe:
    """A kernel `cpu_<name>` for `op`; `bind(problem, session)` gives a function that records its calls."""
    return lambda backend: Kernel(
        name=f"cpu_{name}", op=op, backend=backend, bind=bind, supports=supports or floats_only, priority=priority,
        **fields,
    )  # fmt: skip


def floats_only(problem: Problem) -> str | None:
    return None if problem.dtype in DTYPES else f"computes in {' or '.join(DTYPES)}, not in {problem.dtype}"


def narrow(dtype: str) -> int:
    return int(dtype == "bfloat16")


def operand(weight: Weight | TapeArray, *dtypes: str) -> HostArray | TapeArray:
    """The dense values of a weight, or a bare array. Raises ContractViolation for a dtype that is none of these, which
    C would not see."""
    found = weight.arrays["data"] if isinstance(weight, Weight) else weight
    given = found.dtype if isinstance(found, TapeArray) else found.dtype.name
    if given not in dtypes:
        raise ContractViolation(
            f"a norm's weight, a bias, sinks or scales are {given}; this kernel takes them in {' or '.join(dtypes)}"
        )
    return found


def live_of(*arrays: TapeArray) -> TapeArray | None:
    """What counts the live tokens of a result made of these arrays row by row."""
    return next((x.live for x in arrays if x.live is not None), None)


def extent(x: TapeArray, rows: int) -> dict[str, Field]:
    """How many rows a job over `rows` rows of x has, which begin with x's first dim."""
    return {"live": x.live, "rows": rows, "times": rows // max(1, x.shape[0])}


def grain(width: int) -> int:
    """Rows of an item."""
    return max(1, GRAIN // max(1, width))


def dense(tape: Tape, x: TapeArray) -> TapeArray:
    """x, or a copy of it without gaps."""
    return x if x.dense else copied(tape, x)


def copied(tape: Tape, x: TapeArray, to: TapeArray | None = None) -> TapeArray:
    """Record a copy of x into `to`, rows of x at equal distances, or into a new array without gaps."""
    to = tape.new(x.shape, x.dtype, x.live) if to is None else to
    tail = x.size
    if not (x.dense and to.dense):
        tail = min(tail_of(x), tail_of(to))
    rows, lead = x.size // max(1, tail), lead_of(x, tail)
    if lead is None or (rows > 1 and not evenly(to, tail)):
        tape.host(lambda: assign(to, x), "copy", (x,), (to,))
        return to
    outer, inner, inner_stride = lead
    fields = lookup(x, to, rows, tail * x.itemsize, evenly(to, tail) * x.itemsize)
    fields |= {"from_stride": outer * x.itemsize, "inner": inner, "inner_stride": inner_stride * x.itemsize}
    if rows % max(1, x.shape[0] if x.shape else 1) == 0 and x.shape and tail < x.size:
        fields |= extent(x, rows)
    tape.add(LOOKUP, "copy", (x,), (to,), fields)
    return to


def assign(to: TapeArray, x: TapeArray) -> None:
    to.values()[...] = x.values()


def lookup(x: TapeArray | HostArray, to: TapeArray, rows: int, nbytes: int, to_stride: int) -> dict[str, Field]:
    """The fields of a lookup of rows of `nbytes` bytes, all of them in order; `to_stride` in bytes."""
    return {
        "live": None, "rows": rows, "times": 1, "grain": grain(nbytes), "from": x, "to": to, "index": None,
        "first": None, "count": rows, "bytes": nbytes, "to_stride": to_stride, "from_stride": nbytes, "inner": 1,
        "inner_stride": 0, "scaled": 0, "narrow": 0, "scale": 1.0,
    }  # fmt: skip


def tail_of(x: TapeArray) -> int:
    """How many values lie one after another, of the innermost dims."""
    if x.dense:
        return x.size
    found = 1
    for size, stride in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if size != 1 and stride != found:
            break
        found *= size
    return found


def lead_of(x: TapeArray, tail: int) -> tuple[int, int, int] | None:
    """(outer stride, inner count, inner stride) in values of the runs of `tail` values of x; None for more dims."""
    dims: list[tuple[int, int]] = []
    left = math.prod(x.shape) // max(1, tail)
    for size, stride in zip(x.shape, x.strides, strict=True):
        if left == 1:
            break
        if size == 1:
            continue
        left //= size
        if dims and dims[-1][1] == size * stride:
            dims[-1] = dims[-1][0] * size, stride
        else:
            dims.append((size, stride))
    if not dims:
        return 0, 1, 0
    if len(dims) == 1:
        return dims[0][1], 1, 0
    return (dims[0][1], *dims[1]) if len(dims) == 2 else None


def evenly(x: TapeArray, tail: int) -> int:
    """The distance in values of the runs of `tail` values of x; 0 where it is not always the same."""
    lead = lead_of(x, tail)
    if lead is None or lead[1] > 1:
        return 0
    return lead[0] or tail
