"""Products with weights that are packed in panels (`native/linear.h`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import LinearProblem, itemsize
from lineshaft_contract.weights import Local, Param, Weight
from lineshaft_cpu.engine.kernels.common import (
    EXTENT,
    Job,
    Recipe,
    Tape,
    TapeArray,
    c_int64,
    c_void_p,
    copied,
    dense,
    extent,
    narrow,
    operand,
    recipe,
    tail_of,
)
from lineshaft_cpu.engine.stored import PANEL, panels
from lineshaft_cpu.native import Native

PANELS = "cpu_panels"
BLOCK_BYTES = 768 << 10
"""Of rows of x in an item: they stay in a core's own cache while panels of weights pass, each of which is read once."""
MOST_ROWS = 640
"""Of x in an item: what tiles sum up of them waits on the stack of a thread (MOST_STRIPS of linear.h)."""
DIRECT_ROWS = 32
"""Rows of x up to which tiles take them as they are."""
ORDERED, DIRECT = 1, 2
ITEM_BYTES = 96 << 10
"""Of weights in an item, about: less costs more to hand out than it evens out between threads."""
LINEAR = Job(
    "linear",
    (
        *EXTENT, *((name, c_void_p) for name in ("x", "panels", "bias", "out")),
        *((name, c_int64) for name in ("n", "k", "x_stride", "out_stride", "gate", "block", "grain", "narrow")),
        ("ordered", c_int64), ("tiled", c_int64),
        *((name, c_void_p) for name in ("norm", "rope", "quantize", "tokens")),
    ),
)  # fmt: skip

ORDER = Job("order", (*EXTENT, ("x", c_void_p), ("out", c_void_p), ("k", c_int64), ("x_stride", c_int64)))
TILED = ("amx", "amx_emulated")


def recipes(native: Native) -> Iterator[Recipe]:
    def pack(param: Param, local: Local) -> dict[str, HostArray]:
        return {"data": panels(native.library, param, local)}

    yield recipe("linear", "linear", bind_linear, layout=PANELS, pack=pack, handles=frozenset({"bias"}))


def bind_linear(problem: LinearProblem, session: Any) -> Any:
    threads = session.team.threads
    units = -(-problem.n // PANEL)
    share = -(-units // (4 * threads))
    most = max(1, ITEM_BYTES // (PANEL * problem.k * itemsize(problem.dtype)))
    block = rows_of_item(problem.k, problem.dtype)
    tiled = session.native.level in TILED and problem.dtype == "bfloat16" and problem.k % PANEL == 0

    def linear(x: TapeArray, w: Weight, *, bias: Any = None) -> TapeArray:
        """x [T, I], w [O, I] in panels, bias [O] -> x w^T + bias [T, O], summed in float32 and rounded once."""
        tape = session.tape
        x = x if tail_of(x) >= problem.k else copied(tape, x)
        given = in_tiles(tape, x) if tiled and x.shape[0] > DIRECT_ROWS else x
        out = tape.new((x.shape[0], problem.n), x.dtype, x.live)
        added = None if bias is None else operand(bias, x.dtype)
        if isinstance(added, TapeArray):
            added = dense(tape, added)
        fields = {
            **extent(x, x.shape[0]), "x": given, "panels": w.arrays["data"], "bias": added, "out": out, "n": problem.n,
            "k": problem.k, "x_stride": x.strides[0], "out_stride": problem.n, "gate": 0, "block": block,
            "grain": min(share, most), "narrow": narrow(x.dtype), "ordered": 0,
            "tiled": (DIRECT if given is x else ORDERED) if tiled else 0, "norm": None, "rope": None,
        }  # fmt: skip
        reads = (given, added) if isinstance(added, TapeArray) else (given,)
        tape.add(LINEAR, "linear", reads, (out,), fields)
        return out

    return linear


def rows_of_item(k: int, dtype: str) -> int:
    """Rows of x [m, k] in an item, at most."""
    return max(PANEL, min(MOST_ROWS, BLOCK_BYTES // (k * itemsize(dtype)) // PANEL * PANEL))


def in_tiles(tape: Tape, x: TapeArray) -> TapeArray:
    """Record a copy of x [m, k] in the order of tiles, [m / 32, k / 32, 32, 32], zeros where it ends."""
    rows, k = x.shape
    out = tape.new((-(-rows // PANEL) * PANEL, k), x.dtype, x.live)
    tape.add(ORDER, "order", (x,), (out,), {**extent(x, rows), "x": x, "out": out, "k": k, "x_stride": x.strides[0]})
    return out
