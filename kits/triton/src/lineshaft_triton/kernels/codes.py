"""Narrowing floats to what a cache's pages hold, as the contract says: rounded to even, and saturated.

Floats of eight bits are made by integer arithmetic: each GPU has conversions for some of them alone, and those take an
infinity for the largest number. Knows no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Codes:
    """How values are stored in one dtype.

    top       the largest finite number
    mantissa  bits of it, for floats of eight bits, which are made here; 0 where the language's own cast is taken
    bias      of the exponent
    nan, inf  the codes of both
    unsigned  whether there is no -0, as its code is NaN
    """

    top: float
    mantissa: int = 0
    bias: int = 0
    nan: int = 0
    inf: int = 0
    unsigned: bool = False

    @property
    def constexprs(self) -> dict[str, Any]:
        return {
            "TOP": self.top, "MANTISSA": self.mantissa, "BIAS": self.bias, "NAN": self.nan, "INF": self.inf,
            "UNSIGNED": self.unsigned,
        }  # fmt: skip


CODES: Final = MappingProxyType(
    {
        "float32": Codes(torch.finfo(torch.float32).max),
        "bfloat16": Codes(torch.finfo(torch.bfloat16).max),
        "float16": Codes(65504.0),
        "float8_e4m3fn": Codes(448.0, 3, 7, nan=0x7F, inf=0x7F),
        "float8_e5m2": Codes(57344.0, 2, 15, nan=0x7E, inf=0x7C),
        "float8_e4m3fnuz": Codes(240.0, 3, 8, nan=0x80, inf=0x80, unsigned=True),
        "float8_e5m2fnuz": Codes(57344.0, 2, 16, nan=0x80, inf=0x80, unsigned=True),
    }
)
"""By the name of a dtype (float8: Micikevicius et al., 2022; fnuz: Noune et al., 2022)."""


def stored_view(array: torch.Tensor) -> torch.Tensor:
    """Pages as kernels write them: floats of eight bits as their codes."""
    return array.view(torch.uint8) if array.itemsize == 1 else array


def storable(dtype: str, kv_dtype: str) -> str | None:
    """Why values computed in `dtype` cannot be stored as `kv_dtype` here."""
    if dtype == "float64" or kv_dtype not in CODES:
        return f"does not store {dtype} as {kv_dtype}; it stores floats of 32 bits and less as {', '.join(CODES)}"
    return None


@triton.jit
def stored(
    x, dtype: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr,
    INF: tl.constexpr, UNSIGNED: tl.constexpr,
):  # fmt: skip
    """x f32 in `dtype`, the element type of the pages (uint8 for codes)."""
    limit = tl.where(tl.abs(x) == float("inf"), float("inf"), TOP)  # an infinity stays what it is, as does NaN
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    if MANTISSA:
        DROPPED: tl.constexpr = 23 - MANTISSA
        bits = x.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        # ---- numbers: round to even by adding just under half of the last place, then move to the smaller exponent
        rounded = size + ((1 << (DROPPED - 1)) - 1) + ((size >> DROPPED) & 1)
        code = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
        # ---- below the smallest normal number: the sum with MAGIC has what is wanted in its last bits
        MAGIC: tl.constexpr = 2.0 ** (DROPPED + 1 - BIAS)
        tiny = (tl.abs(x) + MAGIC).to(tl.int32, bitcast=True) - ((DROPPED + 1 - BIAS + 127) << 23)
        code = tl.where(size < ((128 - BIAS) << 23), tiny, code)
        code = tl.where(size == 0x7F800000, INF, code)
        code = tl.where(size > 0x7F800000, NAN, code)
        if UNSIGNED:
            sign = tl.where(code == 0, 0, sign)
        x = (sign | code).to(tl.uint8)
    return x.to(dtype)
