"""How tensors are stored: plain numbers or blocks of quantized ones, and how to turn either into numbers.

Owns the table of block sizes. Knows no file, no model and no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from lineshaft_contract.errors import LayoutError, MisshapenTensor
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.weights import Local, Param, Stored

PLAIN: Final = "none"
_CHUNK_ELEMENTS: Final = 1 << 22  # dequantize this many numbers at a time: bounds the float32 temporaries


@dataclass(frozen=True)
class Block:
    """One quantization block: `size` numbers of a row, stored in `nbytes` bytes."""

    size: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of `columns` numbers, which must be whole blocks."""
        return columns // self.size * self.nbytes


# The formats of GGUF files, under their lower-case names; K-quants have blocks of 256.
BLOCKS: Final[Mapping[str, Block]] = MappingProxyType(
    {
        "q4_0": Block(32, 18),
        "q4_1": Block(32, 20),
        "q5_0": Block(32, 22),
        "q5_1": Block(32, 24),
        "q8_0": Block(32, 34),
        "q2_k": Block(256, 84),
        "q3_k": Block(256, 110),
        "q4_k": Block(256, 144),
        "q5_k": Block(256, 176),
        "q6_k": Block(256, 210),
        "iq2_xxs": Block(256, 66),
        "iq2_xs": Block(256, 74),
        "iq2_s": Block(256, 82),
        "iq3_xxs": Block(256, 98),
        "iq3_s": Block(256, 110),
        "iq1_s": Block(256, 50),
        "iq1_m": Block(256, 56),
        "iq4_nl": Block(32, 18),
        "iq4_xs": Block(256, 136),
        "tq1_0": Block(256, 54),
        "tq2_0": Block(256, 66),
        "mxfp4": Block(32, 17),
    }
)

GGUF_TYPES: Final = (
    "F32", "F16", "Q4_0", "Q4_1", "4", "5", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16",
    "I32", "I64", "F64", "IQ1_M", "BF16", "31", "32", "33", "TQ1_0", "TQ2_0", "36", "37", "38", "MXFP4",
)  # fmt: skip
"""What GGUF files call the type of a tensor, by its number; a number that is not in use is its own name."""


def as_dtype(dtype: str | np.dtype[Any]) -> np.dtype[Any]:
    """The NumPy dtype of a name such as "float32", "bfloat16" or "float8_e4m3fn" (the last two from ml_dtypes).

    Raises MisshapenTensor for a name that is no dtype.
    """
    try:
        return numpy_dtype(dtype) if isinstance(dtype, str) else dtype
    except TypeError as error:
        raise MisshapenTensor(f"dtype {dtype!r} is unknown; use a name of NumPy or ml_dtypes") from error


def cut_columns(scheme: str, start: int, stop: int, tensor: str) -> slice:
    """Where the columns `start:stop` lie along the last dim of the stored array: in numbers, or bytes if in blocks.

    Raises LayoutError if a bound is not on a block border.
    """
    if scheme == PLAIN:
        return slice(start, stop)
    block = BLOCKS[scheme]
    if start % block.size or stop % block.size:
        raise LayoutError(
            f"tensor {tensor} is stored as {scheme}, in blocks of {block.size} columns, and cannot be cut at "
            f"{start}:{stop}; both must be multiples of {block.size}: use a smaller tp, or a checkpoint that is not "
            "quantized in blocks"
        )
    return slice(block.row_bytes(start), block.row_bytes(stop))


def dequantize(stored: Stored, dtype: str | np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The numbers of `stored`, as an array of its logical shape and of `dtype`.

    Plain numbers of that dtype already are returned as they are, without a copy. Blocks become float32 first and
    are then rounded to `dtype`. Raises MisshapenTensor for an unknown scheme.
    """
    target = as_dtype(dtype)
    data = stored.arrays["data"]
    if stored.scheme == PLAIN:
        return data.astype(target, copy=False)
    if stored.scheme not in BLOCKS:
        raise MisshapenTensor(
            f"scheme {stored.scheme!r} cannot be dequantized; allowed are {PLAIN}, {', '.join(sorted(BLOCKS))}"
        )
    return _from_blocks(stored, data, target)


def check_parts(param: Param, local: Local) -> None:
    """Raises MisshapenTensor if the parts, joined along dim 0, do not make up the param's shape: as they are, or as
    matrices that a param of more dims stacks."""
    rows = sum(part.shape[0] for part in local.parts)
    tails = {tuple(part.shape[1:]) for part in local.parts}
    whole = (param.shape[0], {param.shape[1:]}), (prod(param.shape[:-1]), {param.shape[-1:]})
    if (rows, tails) not in whole:
        found = " + ".join(str(list(part.shape)) for part in local.parts)
        raise MisshapenTensor(f"weight {param.name}: the checkpoint's parts {found} do not make up {list(param.shape)}")


def _from_blocks(stored: Stored, data: np.ndarray[Any, Any], target: np.dtype[Any]) -> np.ndarray[Any, Any]:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_blocks

    kind = GGMLQuantizationType[stored.scheme.upper()]
    out = np.empty((prod(stored.shape[:-1]), stored.shape[-1]), target)
    rows = data.reshape(out.shape[0], data.shape[-1])
    step = max(1, _CHUNK_ELEMENTS // max(1, out.shape[1]))
    for first in range(0, out.shape[0], step):
        chunk = np.ascontiguousarray(rows[first : first + step])
        out[first : first + step] = dequantize_blocks(chunk, kind)
    return out.reshape(stored.shape)
