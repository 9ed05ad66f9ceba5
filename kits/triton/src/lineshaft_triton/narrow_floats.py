"""Corrects how Triton's interpreter treats narrow floats, so that what it computes is what a GPU would.

As of Triton 3.9 it narrows float32 to bfloat16 by cutting bits off, loses the carry where rounding reaches the next power
of two, reads infinities and NaN of eight bits as numbers, and multiplies the bit patterns of bfloat16 tiles as integers.
Knows no kernel.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Array = np.ndarray[Any, Any]

_NARROW: dict[Any, Any] = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
    tl.float8e4b8: ml_dtypes.float8_e4m3fnuz,
    tl.float8e5b16: ml_dtypes.float8_e5m2fnuz,
}
_KNOWN: dict[Any, Any] = {**_NARROW, tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}


def correct_interpreter() -> None:
    """Put the corrections in place; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder.create_dot, "corrected", False):
        return
    interpreter._convert_float = _corrected(interpreter._convert_float, _converting)
    builder.create_dot = _corrected(builder.create_dot, _multiplying)
    builder.create_si_to_fp = _corrected(builder.create_si_to_fp, _from_integers)


def _corrected(original: Any, correct: Any) -> Any:
    made = correct(original)
    made.corrected = True
    return made


def _converting(original: Any) -> Any:
    def convert(values: Array, source: Any, target: Any, rounding: Any) -> Array:
        """Bits of `source` floats -> bits of `target` floats of the same shape, rounded to even."""
        toward_zero = rounding is not None and rounding != interpreter._ir.ROUNDING_MODE.RTNE
        if toward_zero or source not in _KNOWN or target not in _KNOWN:
            return original(values, source, target, rounding)
        floats = np.ascontiguousarray(values).view(_KNOWN[source])
        with np.errstate(over="ignore", invalid="ignore"):
            narrowed = floats.astype(np.float32).astype(_KNOWN[target])
        return narrowed.view(f"uint{target.primitive_bitwidth}")

    return convert


def _multiplying(original: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *modes: Any) -> Any:
        """a b + d, of bfloat16 operands as the numbers that they are."""
        return original(self, _widened(a), _widened(b), d, *modes)

    return create_dot


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    floats = np.ascontiguousarray(operand.data).view(ml_dtypes.bfloat16).astype(np.float32)
    return interpreter.TensorHandle(floats, tl.float32)


def _from_integers(original: Any) -> Any:
    def create_si_to_fp(self: Any, operand: Any, target: Any) -> Any:
        """Integers as floats, and as those of bfloat16 not cut to their bits."""
        if target.scalar != tl.bfloat16:
            return original(self, operand, target)
        return interpreter.TensorHandle(operand.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    return create_si_to_fp
