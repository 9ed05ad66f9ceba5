"""Parameters as their checkpoint stores them, to dense arrays and panels: by C (`native/pack.c`), and by the contract's
`dequantize` where C does not know the format."""

from __future__ import annotations

from ctypes import CDLL, c_char_p, c_int, c_int64, c_void_p
from math import prod

import numpy as np

from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.schemes import PLAIN, check_parts, dequantize
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_cpu.engine.memory import room

PANEL = 32
"""Rows of a panel."""
ITEMSIZES = {"bfloat16": 2, "float32": 4}
"""What C makes."""


def dense(library: CDLL, param: Param, local: Local) -> HostArray:
    """The parameter in checkpoint order. Raises MisshapenTensor."""
    check_parts(param, local)
    whole = room(param.shape, param.dtype)
    rows = whole.reshape(-1, *local.parts[0].shape[1:]) if local.parts else whole
    first = 0
    for part in local.parts:
        if not unpack(library, part, whole, param.dtype, first, panels=False):
            rows[first : first + part.shape[0]] = dequantize(part, param.dtype)
        first += part.shape[0]
    return whole


def panels(library: CDLL, param: Param, local: Local) -> HostArray:
    """A matrix [n, k] in panels of 32 rows, zeros where it ends: bfloat16 [n / 32, k / 2, 32, 2], float32
    [n / 32, k, 32, 1]. Raises MisshapenTensor."""
    check_parts(param, local)
    (n, k), pair = param.shape, 4 // ITEMSIZES[param.dtype]
    whole = room((-(-n // PANEL), -(-k // pair), PANEL, pair), param.dtype)
    first = 0
    for part in local.parts:
        if not unpack(library, part, whole, param.dtype, first, panels=True):
            plain = Stored(PLAIN, part.shape, {"data": dequantize(part, param.dtype)})
            unpack(library, plain, whole, param.dtype, first, panels=True)
        first += part.shape[0]
    return whole


def unpack(library: CDLL, part: Stored, to: HostArray, dtype: str, first: int, panels: bool) -> bool:
    """Whether C has put a part's rows in place: from the row `first` on of `to`, an array of `dtype` without gaps."""
    data = part.arrays["data"]
    if dtype not in ITEMSIZES or len(part.shape) < 2 or not data.dtype.isnative or 0 in part.shape:
        return False
    apart = prod(part.shape[1:-1])
    rows = data.reshape(part.shape[0] * apart, -1)
    if rows.strides[1] != rows.itemsize:
        rows = np.ascontiguousarray(rows)
    name = data.dtype.name if part.scheme == PLAIN else part.scheme
    run = library.lineshaft_unpack
    run.argtypes = (c_char_p, c_void_p, *(c_int64,) * 4, c_void_p, c_int64, c_int, c_int)
    taken: int = run(
        name.encode(), rows.ctypes.data, rows.shape[1] * rows.itemsize, rows.strides[0], rows.shape[0], part.shape[-1],
        to.ctypes.data, first * apart, panels, dtype == "bfloat16",
    )  # fmt: skip
    return bool(taken)
