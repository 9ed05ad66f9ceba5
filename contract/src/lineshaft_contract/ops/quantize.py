"""How weights of a product are quantized: the one rule that reference, packings and tests share, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from lineshaft_contract.ops.checks import refuse
from lineshaft_contract.ops.spec import HostArray, numpy_dtype

NONE: Final = "none"
LEAST_SCALE: Final = np.float32(2.0**-126)
"""The least normal float32. Smaller ones are zero on devices that flush them, so no scale is smaller."""
_CHUNK_ELEMENTS: Final = 1 << 22  # numbers at a time: bounds the float32 temporaries


@dataclass(frozen=True)
class WeightScheme:
    """Symmetric codes of `dtype`, the largest of which is `top`, with a float32 scale for each row."""

    dtype: str
    top: float


WEIGHT_SCHEMES: Final = MappingProxyType(
    {"int8": WeightScheme("int8", 127.0), "fp8": WeightScheme("float8_e4m3fn", 448.0)}
)


def weight_scheme(op: str, scheme: str) -> WeightScheme:
    """Raises ContractViolation for a name that is none of `WEIGHT_SCHEMES`."""
    if scheme not in WEIGHT_SCHEMES:
        refuse(op, f"scheme {scheme!r}", f"one of {', '.join((NONE, *WEIGHT_SCHEMES))}")
    return WEIGHT_SCHEMES[scheme]


def quantize_rows(w: HostArray, scheme: str) -> tuple[HostArray, HostArray]:
    """w [n, k] of any float dtype -> codes [n, k] (int8, float8_e4m3fn) and scale f32[n]: w[i] is codes[i] * scale[i].

    All of it is computed in float32, to which w is rounded first. scale = max |w| of the row / top, top being 127 or
    448; where that is below 2^-126, as for a row of zeros, scale = 1. code = w / scale (a division, not a product with
    the reciprocal), clipped to [-top, top], rounded to the nearest, halves to even; in fp8 a negative number that
    rounds to 0 keeps its sign. A row that holds a NaN, or what is infinite in float32, has scale NaN and codes 0, so
    that all its products are NaN. Raises ContractViolation for an unknown scheme.
    """
    found = weight_scheme("linear", scheme)
    codes, scales = np.empty(w.shape, numpy_dtype(found.dtype)), np.empty(w.shape[0], np.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, w.shape[1]))
    for first in range(0, w.shape[0], step):
        rows = slice(first, first + step)
        codes[rows], scales[rows] = _quantize(w[rows], found)
    return codes, scales


def _quantize(w: HostArray, scheme: WeightScheme) -> tuple[HostArray, HostArray]:
    top = np.float32(scheme.top)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = w.astype(np.float32)
        scale = np.abs(wide).max(axis=1, initial=0) / top
        scale[scale < LEAST_SCALE] = 1
        codes = np.clip(wide / scale[:, None], -top, top)
    lost = ~np.isfinite(scale)
    scale[lost], codes[lost] = np.nan, 0
    dtype = numpy_dtype(scheme.dtype)
    return (np.rint(codes) if dtype.kind == "i" else codes).astype(dtype), scale


def quantized_bytes(n: int, k: int) -> int:
    """Bytes of a weight [n, k] in codes of 8 bits, with its scales."""
    return n * k + 4 * n
