"""The packing of weights quantized row by row, from whatever the checkpoint stores; the rule is the contract's. And
what a packing makes of shapes alone."""

from __future__ import annotations

import numpy as np

from lineshaft_contract.kernels import Pack
from lineshaft_contract.ops.quantize import quantize_rows, weight_scheme
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.schemes import check_parts, dequantize
from lineshaft_contract.weights import Local, Param, Stored


def pack_rows(scheme: str) -> Pack:
    """A packing {"q": codes [n, k], "scale": f32[n]} of a share [n, k]: its parts joined, in the param's dtype, and
    quantized by `quantize_rows`. Blocks of a quantized file are decoded first, a part at a time.

    Raises ContractViolation for an unknown scheme; the packing MisshapenTensor for parts that do not make up the shape.
    """
    codes = numpy_dtype(weight_scheme("linear", scheme).dtype)

    def pack(param: Param, local: Local) -> dict[str, HostArray]:
        check_parts(param, local)
        q, scale, first = np.empty(param.shape, codes), np.empty(param.shape[0], np.float32), 0
        for part in local.parts:
            rows = slice(first, first + part.shape[0])
            q[rows], scale[rows] = quantize_rows(dequantize(part, param.dtype), scheme)
            first = rows.stop
        return {"q": q, "scale": scale}

    return pack


def empty_share(param: Param) -> Local:
    """A share of zeros that takes no memory, to learn a packing's shapes from."""
    zero = np.zeros((), numpy_dtype(param.dtype))
    return Local((Stored("none", param.shape, {"data": np.broadcast_to(zero, param.shape)}),))
