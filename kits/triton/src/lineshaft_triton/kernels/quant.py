"""Weights and activations in codes of eight bits, as the matrix instructions of a target read them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lineshaft_contract.kernels import Pack
from lineshaft_contract.ops.quantize import WEIGHT_SCHEMES
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.packing import pack_rows
from lineshaft_contract.weights import Local, Param
from lineshaft_triton.targets import FN, FNUZ, Target

NEGATIVE_ZERO = 0x80
"""-0 in e4m3fn, and NaN in e4m3fnuz, which has one zero."""


def fnuz(codes: HostArray, scale: HostArray) -> tuple[HostArray, HostArray]:
    """codes of e4m3fn and scales -> codes of e4m3fnuz and scales of the same products.

    The exponent's bias is greater by one, so that the same bits are half the number, exactly; scales are doubled.
    """
    bits = codes.view(np.uint8).copy()
    bits[bits == NEGATIVE_ZERO] = 0
    return bits.view(numpy_dtype(FNUZ)), scale * np.float32(2)


def _pack_fnuz(param: Param, local: Local) -> dict[str, Any]:
    packed = pack_rows("fp8")(param, local)
    codes, scale = fnuz(packed["q"], packed["scale"])
    return {"q": codes, "scale": scale}


def packing(scheme: str, where: Target) -> tuple[str, Pack]:
    """Name and packing of weights [n, k] of a scheme: {"q": codes [n, k], "scale": f32[n]}."""
    if WEIGHT_SCHEMES[scheme].dtype == FN and where.fp8 == FNUZ:
        return f"{scheme}_fnuz_rows", _pack_fnuz
    return f"{scheme}_rows", pack_rows(scheme)


def missing(scheme: str, where: Target) -> str | None:
    """None, or why kernels of a target cannot read codes of a scheme."""
    if WEIGHT_SCHEMES[scheme].dtype == FN and not where.fp8:
        return f"{where.name} reads no floats of eight bits"
    return None
