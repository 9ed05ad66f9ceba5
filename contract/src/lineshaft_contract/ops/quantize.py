"""How operands of a product are quantized: the rules that reference, packings, kernels and tests share, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np

from lineshaft_contract.ops.checks import refuse
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.problems import LinearProblem

NONE: Final = "none"
INT4: Final = "int4"
"""The scheme of weights in codes of 4 bits, of which groups along k share a scale (`quantize_groups`)."""
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
"""Schemes of weights in codes of 8 bits, row by row (`quantize_rows`)."""
ACTIVATION_SCHEMES: Final = MappingProxyType({"w8a8_int8": "int8", "w8a8_fp8": "fp8"})
"""Schemes under which activations are quantized too -> the scheme by whose rule the rows of both operands are."""
LINEAR_SCHEMES: Final = (*WEIGHT_SCHEMES, INT4, *ACTIVATION_SCHEMES)
"""All that round a weight, whatever it is stored as."""
BLOCK: Final = 32
"""Numbers along k of a block."""


@dataclass(frozen=True)
class BlockScheme:
    """Blocks of GGUF files: a number is (code - zero) * scale, plus the `offset` of its block if there is one; codes
    have `bits`, scale and offset are float16."""

    bits: int
    zero: int
    offset: bool

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return 2 + 2 * self.offset + BLOCK * self.bits // 8


BLOCK_SCHEMES: Final = MappingProxyType(
    {"q4_0": BlockScheme(4, 8, False), "q4_1": BlockScheme(4, 0, True), "q8_0": BlockScheme(8, 0, False)}
)
"""Schemes of weights that a checkpoint stores in blocks, whose own codes and scales are used."""


def weight_scheme(op: str, scheme: str) -> WeightScheme:
    """The codes of 8 bits that a scheme has for rows; raises ContractViolation for one that has none."""
    rule = ACTIVATION_SCHEMES.get(scheme, scheme)
    if rule not in WEIGHT_SCHEMES:
        refuse(op, f"scheme {scheme!r}", f"one of {', '.join((*WEIGHT_SCHEMES, *ACTIVATION_SCHEMES))}")
    return WEIGHT_SCHEMES[rule]


def check_scheme(op: str, problem: LinearProblem) -> None:
    """Raises ContractViolation for an unknown scheme, and for a `group_size` or k that the scheme does not go with."""
    known = (NONE, *LINEAR_SCHEMES, *BLOCK_SCHEMES)
    if problem.scheme not in known:
        refuse(op, f"scheme {problem.scheme!r}", f"one of {', '.join(known)}")
    if problem.scheme in BLOCK_SCHEMES and problem.k % BLOCK:
        refuse(
            op, f"k = {problem.k} under scheme {problem.scheme!r}", f"a multiple of {BLOCK}: it has blocks of as many"
        )
    size = problem.group_size
    if problem.scheme != INT4 and size:
        refuse(op, f"group_size {size} under scheme {problem.scheme!r}", f"0: only {INT4} has groups")
    if problem.scheme == INT4 and (size < 2 or size % 2 or problem.k % size):
        refuse(op, f"group_size {size} with k = {problem.k}", "an even one that divides k")


def quantize_rows(x: HostArray, scheme: str) -> tuple[HostArray, HostArray]:
    """x [n, k] of any float dtype -> codes [n, k] (int8, float8_e4m3fn) and scale f32[n]: x[i] is codes[i] * scale[i].

    All of it is computed in float32, to which x is rounded first. scale = max |x| of the row / top, top being 127 or
    448; where that is below 2^-126, as for a row of zeros, scale = 1. code = x / scale (a division, not a product with
    the reciprocal), clipped to [-top, top], rounded to the nearest, halves to even; in fp8 a negative number that
    rounds to 0 keeps its sign. A row that holds a NaN, or what is infinite in float32, has scale NaN and codes 0, so
    that all its products are NaN. Raises ContractViolation for a scheme without codes of 8 bits.
    """
    found = weight_scheme("linear", scheme)
    codes, scales = np.empty(x.shape, numpy_dtype(found.dtype)), np.empty(x.shape[0], np.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, x.shape[1]))
    for first in range(0, x.shape[0], step):
        rows = slice(first, first + step)
        codes[rows], scales[rows] = _quantize(x[rows], found)
    return codes, scales


def _quantize(x: HostArray, scheme: WeightScheme) -> tuple[HostArray, HostArray]:
    top = np.float32(scheme.top)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = x.astype(np.float32)
        scale = np.abs(wide).max(axis=1, initial=0) / top
        scale[scale < LEAST_SCALE] = 1
        codes = np.clip(wide / scale[:, None], -top, top)
    lost = ~np.isfinite(scale)
    scale[lost], codes[lost] = np.nan, 0
    dtype = numpy_dtype(scheme.dtype)
    return (np.rint(codes) if dtype.kind == "i" else codes).astype(dtype), scale


def quantize_groups(w: HostArray, size: int) -> tuple[HostArray, HostArray]:
    """w [n, k] of any float dtype -> codes int8[n, k] from -8 to 7 and scale f32[n, k / size]: w[i, j] is
    codes[i, j] * scale[i, j // size].

    All of it is computed in float32, to which w is rounded first. scale = m / -8, where m is the number of largest
    magnitude in the group, the first of them in a tie: it has the code -8, and the scale has the other sign. Where
    |scale| is below 2^-126, as for zeros, scale = 1. code = w / scale, clipped to [-8, 7], rounded to the nearest,
    halves to even. A group that holds a NaN, or what is infinite in float32, has scale NaN and codes 0. Numbers that
    such codes stand for, as in GGUF's Q4_0, which has this rule, give those codes and scales again. `size` divides k.
    """
    codes, scales = np.empty(w.shape, np.int8), np.empty((w.shape[0], w.shape[1] // size), np.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, w.shape[1]))
    for first in range(0, w.shape[0], step):
        rows = slice(first, first + step)
        found, scales[rows] = _quantize_groups(w[rows].reshape(-1, scales.shape[1], size))
        codes[rows] = found.reshape(-1, w.shape[1])
    return codes, scales


def _quantize_groups(groups: HostArray) -> tuple[HostArray, HostArray]:
    with np.errstate(over="ignore", invalid="ignore"):
        wide = groups.astype(np.float32)
        largest = np.abs(wide).argmax(axis=2, keepdims=True)  # of a NaN, where there is one
        scale = np.take_along_axis(wide, largest, 2) / np.float32(-8)
        scale[np.abs(scale) < LEAST_SCALE] = 1
        codes = np.rint(np.clip(wide / scale, -8, 7))
    lost = ~np.isfinite(scale[..., 0])
    scale[lost], codes[lost] = np.nan, 0
    return codes.astype(np.int8), scale[..., 0]


def quantize_blocks(w: HostArray, scheme: str) -> HostArray:
    """w [n, k] of any float dtype -> the blocks that GGUF files have for it, by their reference rule from w in float32:
    uint8[n, bytes of k / 32 blocks]. Only for numbers that are not stored in such blocks."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    with np.errstate(all="ignore"):
        found: HostArray = quantize(w.astype(np.float32), GGMLQuantizationType[scheme.upper()])
    return found


def block_parts(data: HostArray, scheme: str) -> tuple[HostArray, ...]:
    """Blocks uint8[n, bytes] -> codes int8[n, k] less their zero, scale f16[n, k / 32], and offset f16[n, k / 32] where
    the scheme has one.

    A block is its scale, its offset, and its codes: int8, or of 4 bits those of the first 16 numbers in the low halves
    of 16 bytes and those of the others in the high ones.
    """
    rule = BLOCK_SCHEMES[scheme]
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, rule.nbytes)
    head = 2 + 2 * rule.offset
    steps = np.ascontiguousarray(blocks[..., :head]).view(np.float16)
    codes = blocks[..., head:]
    if rule.bits == 4:
        codes = np.concatenate((codes & 15, codes >> 4), axis=-1)
    return (codes.view(np.int8) - np.int8(rule.zero)).reshape(len(data), -1), *np.moveaxis(steps, 2, 0)


def pack_nibbles(codes: HostArray) -> HostArray:
    """int8[n, k] from -8 to 7 -> uint8[n, k / 2]: code + 8 of column 2j in the low half of byte j, of 2j + 1 in the
    high one."""
    raised = (codes + 8).astype(np.uint8)
    packed: HostArray = raised[:, ::2] | raised[:, 1::2] << 4
    return packed


def unpack_nibbles(packed: HostArray) -> HostArray:
    """What `pack_nibbles` was given."""
    halves = np.stack((packed & 15, packed >> 4), axis=-1)
    return halves.reshape(len(packed), -1).astype(np.int8) - np.int8(8)


def fnuz_codes(codes: HostArray, scale: HostArray) -> tuple[HostArray, HostArray]:
    """Codes of float8_e4m3fn with float32 scales -> codes of float8_e4m3fnuz with scales, of the very same products.

    The bias of fnuz exponents is greater by one: the same bits are half the number, and scales are doubled. 0x80, which
    is -0, becomes 0, as it is NaN there; and NaN becomes it.
    """
    bits = np.where(np.isnan(codes), 0x80, np.where(codes == 0, 0, codes.view(np.uint8))).astype(np.uint8)
    return bits.view(numpy_dtype("float8_e4m3fnuz")), scale * np.float32(2)


def quantized_bytes(n: int, k: int, group_size: int = 0, scheme: str = "") -> int:
    """Bytes of a weight [n, k] with its scales: in blocks, where the scheme has them, else in codes of 8 bits or, where
    groups of `group_size` share a scale, of 4."""
    if scheme in BLOCK_SCHEMES:
        return n * k // BLOCK * BLOCK_SCHEMES[scheme].nbytes
    return n * k // 2 + 4 * (n * k // group_size) if group_size else n * k + 4 * n
