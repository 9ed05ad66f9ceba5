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
BLOCK = 256
"""Rows of an item: they stay in a core's cache while panels of weights pass."""
ITEM_BYTES = 96 << 10
"""Of weights in an item, about: less costs more to hand out than it evens out between threads."""
LINEAR = Job(
    "linear",
    (
        *EXTENT, *((name, c_void_p) for name in ("x", "panels", "bias", "out")),
        *((name, c_int64) for name in ("n", "k", "x_stride", "out_stride", "gate", "block", "grain", "narrow")),
    ),
)  # fmt: skip


def recipes(native: Native) -> Iterator[Recipe]:
    def pack(param: Param, local: Local) -> dict[str, HostArray]:
        return {"data": panels(native.library, param, local)}

    yield recipe("linear", "linear", bind_linear, layout=PANELS, pack=pack, handles=frozenset({"bias"}))


def bind_linear(problem: LinearProblem, session: Any) -> Any:
    threads = session.team.threads
    units = -(-problem.n // PANEL)
    share = -(-units // (4 * threads))
    most = max(1, ITEM_BYTES // (PANEL * problem.k * itemsize(problem.dtype)))

    def linear(x: TapeArray, w: Weight, *, bias: Any = None) -> TapeArray:
        """x [T, I], w [O, I] in panels, bias [O] -> x w^T + bias [T, O], summed in float32 and rounded once."""
        tape = session.tape
        x = x if tail_of(x) >= problem.k else copied(tape, x)
        out = tape.new((x.shape[0], problem.n), x.dtype, x.live)
        added = None if bias is None else operand(bias)
        if isinstance(added, TapeArray):
            added = dense(tape, added)
        fields = {
            **extent(x, x.shape[0]), "x": x, "panels": w.arrays["data"], "bias": added, "out": out, "n": problem.n,
            "k": problem.k, "x_stride": x.strides[0], "out_stride": problem.n, "gate": 0, "block": BLOCK,
            "grain": min(share, most), "narrow": narrow(x.dtype),
        }  # fmt: skip
        reads = (x, added) if isinstance(added, TapeArray) else (x,)
        tape.add(LINEAR, "linear", reads, (out,), fields)
        return out

    return linear
