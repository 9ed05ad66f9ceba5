"""Weights and activations in codes, as the matrix instructions of a target read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, INT4, LEAST_SCALE, WEIGHT_SCHEMES
from lineshaft_contract.packing import pack_fnuz_rows, weight_packing
from lineshaft_contract.sessions import Packing
from lineshaft_torch.arrays import torch_dtype
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.kernels.rowwise import warps
from lineshaft_triton.launch import Config, launch
from lineshaft_triton.targets import FN, FNUZ, Target

WIDEST = 4096
"""Values of a row that a program of `quantize_kernel` holds at a time."""
INTERPRETED_ROWS = 32


@dataclass(frozen=True)
class Codes:
    """How weights of a scheme lie on a target.

    rule         "int8", "fp8" or "int4": what codes of weights, and of activations, are
    activations  whether activations are in codes too
    dtype        of codes, as the target reads them; of "int4" two lie in a byte
    """

    rule: str
    activations: bool
    dtype: str
    packing: Packing


def codes_of(scheme: str, where: Target) -> Codes:
    """What a scheme of `LINEAR_SCHEMES` is on a target; its dtype is "" where that one has none for its codes."""
    rule = ACTIVATION_SCHEMES.get(scheme, scheme)
    stored = "uint8" if rule == INT4 else WEIGHT_SCHEMES[rule].dtype
    dtype = where.fp8 if stored == FN else stored
    packing = Packing("fp8_fnuz_rows", pack_fnuz_rows) if dtype == FNUZ else weight_packing(scheme)
    return Codes(rule, scheme in ACTIVATION_SCHEMES, dtype, packing)


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, m, k, x_row, TOP: tl.constexpr, LEAST: tl.constexpr, WHOLE: tl.constexpr,
    HALVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [m, k] -> codes [m, k] and scales f32[m] by the rule of `quantize_rows`, to the bit. Grid (blocks of ROWS).

    HALVED: codes are those of e4m3fnuz, whose bits are half the number of e4m3fn; so scales are doubled.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)[None, :]
    there = (rows < m)[:, None]
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_row
    codes_at = codes_ptr + rows.to(tl.int64)[:, None] * k
    # the largest magnitude: among the bits of numbers without a sign, where NaN comes last
    largest = tl.full((ROWS, BLOCK), 0, tl.int32)
    for start in range(0, k, BLOCK):
        x = tl.load(x_at + start + at, there & (start + at < k), 0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, 1)
    lost = bits >= 0x7F800000
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full((ROWS,), TOP, tl.float32))
    scale = tl.where(scale < LEAST, 1.0, scale)
    for start in range(0, k, BLOCK):
        inside = there & (start + at < k)
        x = tl.load(x_at + start + at, inside, 0.0).to(tl.float32)
        code = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, BLOCK)))
        code = tl.where(lost[:, None], 0.0, tl.minimum(tl.maximum(code, -TOP), TOP))
        # round to multiples of a unit, halves to even: adding what leaves no bits below it does
        if WHOLE:
            unit = 1.0
        else:
            power = (code.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            unit = tl.maximum(power, 0.015625) * 0.125  # of three bits after the point, from 2^-6 on
        code = code + unit * 12582912.0 - unit * 12582912.0
        if HALVED:
            code = code * 0.5
        tl.store(codes_at + start + at, code.to(codes_ptr.dtype.element_ty), inside)
    scale = tl.where(lost, float("nan"), scale * 2 if HALVED else scale)
    tl.store(scale_ptr + rows, scale, rows < m)


def quantized(session: Any, where: Target, x: torch.Tensor, codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, k] with dense terms -> its codes [m, k] and scales f32[m], in two passes over each row."""
    m, k = x.shape
    block = min(WIDEST, triton.next_power_of_2(k))
    rows = INTERPRETED_ROWS if interpreting() else 1
    config = Config({"ROWS": rows, "BLOCK": block}, num_warps=warps(block, where), num_stages=1)
    made = torch.empty((m, k), dtype=torch_dtype(codes.dtype), device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    launch(
        session, quantize_kernel, (triton.cdiv(m, rows),), config, x, made, scale, m, k, x.stride(0),
        TOP=WEIGHT_SCHEMES[codes.rule].top, LEAST=float(LEAST_SCALE), WHOLE=codes.rule == "int8",
        HALVED=codes.dtype == FNUZ,
    )  # fmt: skip
    return made, scale
