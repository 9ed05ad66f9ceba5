"""The packings of quantized weights, from whatever the checkpoint stores; the rules are those of `ops.quantize`.

And what a packing makes of shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.kernels import Pack
from lineshaft_contract.ops.quantize import (
    ACTIVATION_SCHEMES,
    BLOCK,
    BLOCK_SCHEMES,
    INT4,
    fnuz_codes,
    pack_nibbles,
    quantize_blocks,
    quantize_groups,
    quantize_rows,
    weight_scheme,
)
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.problems import LinearProblem
from lineshaft_contract.schemes import check_parts, dequantize
from lineshaft_contract.sessions import Packing
from lineshaft_contract.weights import Local, Param, Stored


def weight_packing(scheme: str) -> Packing:
    """How weights of a scheme are packed by kernels without a reason for another layout; those of one rule alike,
    whether or not activations are quantized too. Raises ContractViolation for an unknown scheme."""
    rule = ACTIVATION_SCHEMES.get(scheme, scheme)
    return Packing(f"{rule}_rows", pack_groups if rule == INT4 else pack_rows(rule))


def pack_rows(scheme: str) -> Pack:
    """A packing {"q": codes [n, k], "scale": f32[n]} of a share [n, k]: its parts joined, in the param's dtype, and
    quantized by `quantize_rows`. Blocks of a quantized file are decoded first, a part at a time.

    Raises ContractViolation for a scheme without codes of 8 bits; the packing MisshapenTensor for parts that do not
    make up the shape.
    """
    codes = numpy_dtype(weight_scheme("linear", scheme).dtype)

    def pack(param: Param, local: Local) -> dict[str, HostArray]:
        q, scale = np.empty(param.shape, codes), np.empty(param.shape[0], np.float32)
        for rows, part in _parts(param, local):
            q[rows], scale[rows] = quantize_rows(part, scheme)
        return {"q": q, "scale": scale}

    return pack


def pack_fnuz_rows(param: Param, local: Local) -> dict[str, HostArray]:
    """What `pack_rows("fp8")` makes in codes of float8_e4m3fnuz, of the very same products (`fnuz_codes`)."""
    codes, scale = fnuz_codes(*pack_rows("fp8")(param, local).values())
    return {"q": codes, "scale": scale}


def pack_groups(param: Param, local: Local) -> dict[str, HostArray]:
    """The packing {"q": uint8[n, k / 2], "scale": f32[n, k / group_size]} of a share [n, k]: as `pack_rows`, quantized
    by `quantize_groups` and `pack_nibbles`. The size of a group is that of the param's "linear" problem.

    Raises ContractViolation where that is none, MisshapenTensor for parts that do not make up the shape.
    """
    problem = param.problems.get("linear")
    if not isinstance(problem, LinearProblem) or not problem.group_size:
        raise ContractViolation(f"weight {param.name}: codes in groups need a linear problem with a group_size")
    (n, k), size = param.shape, problem.group_size
    q, scale = np.empty((n, k // 2), np.uint8), np.empty((n, k // size), np.float32)
    for rows, part in _parts(param, local):
        codes, scale[rows] = quantize_groups(part, size)
        q[rows] = pack_nibbles(codes)
    return {"q": q, "scale": scale}


def pack_blocks(scheme: str) -> Pack:
    """The packing {"data": uint8[n, bytes of k / 32 blocks]} of a share [n, k] that a checkpoint stores in blocks of
    `scheme`: as they are. A part that is stored otherwise is put into such blocks (`quantize_blocks`).

    The packing raises MisshapenTensor for parts that do not make up the shape.
    """

    def pack(param: Param, local: Local) -> dict[str, HostArray]:
        check_parts(param, local)
        data = np.empty((param.shape[0], param.shape[1] // BLOCK * BLOCK_SCHEMES[scheme].nbytes), np.uint8)
        first = 0
        for part in local.parts:
            stored = part.arrays["data"] if part.scheme == scheme else None
            rows = slice(first, first + part.shape[0])
            data[rows] = quantize_blocks(dequantize(part, param.dtype), scheme) if stored is None else stored
            first = rows.stop
        return {"data": data}

    return pack


def _parts(param: Param, local: Local) -> Iterator[tuple[slice, HostArray]]:
    """Each part of a share in the param's dtype, and the rows that it is."""
    check_parts(param, local)
    first = 0
    for part in local.parts:
        rows = slice(first, first + part.shape[0])
        yield rows, dequantize(part, param.dtype)
        first = rows.stop


def empty_share(param: Param) -> Local:
    """A share of zeros that takes no memory, to learn a packing's shapes from."""
    zero = np.zeros((), numpy_dtype(param.dtype))
    return Local((Stored("none", param.shape, {"data": np.broadcast_to(zero, param.shape)}),))
