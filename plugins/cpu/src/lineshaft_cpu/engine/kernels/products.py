"""Products with weights that are packed in panels (`native/linear.h`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import LinearProblem, itemsize
from lineshaft_contract.schemes import check_parts, dequantize
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
from lineshaft_cpu.native import Native

PANELS = "cpu_panels"
PANEL = 32
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
    yield recipe("linear", "linear", bind_linear, layout=PANELS, pack=pack, handles=frozenset({"bias"}))


def pack(param: Param, local: Local) -> dict[str, HostArray]:
    """{"data": a weight [n, k] in panels, as of `panels_of`}."""
    check_parts(param, local)
    return {"data": panels_of(np.concatenate([dequantize(part, param.dtype) for part in local.parts]))}


def panels_of(whole: HostArray) -> HostArray:
    """Weights [..., n, k] in panels of 32 outputs: bfloat16 [..., n / 32, k / 2, 32, 2], float32
    [..., n / 32, k, 32, 1], zeros where they end."""
    *lead, n, k = whole.shape
    pair = 2 if whole.dtype.itemsize == 2 else 1
    if n % PANEL or k % pair:
        whole = np.pad(whole, (*((0, 0) for _ in lead), (0, -n % PANEL), (0, -k % pair)))
    bits = whole.view(np.uint16 if pair == 2 else np.uint32)
    panels = bits.reshape(*lead, -1, PANEL, whole.shape[-1] // pair, pair).swapaxes(-3, -2)
    return np.ascontiguousarray(panels).view(whole.dtype)


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
