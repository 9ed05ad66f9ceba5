"""Corrects what Triton's interpreter gets wrong about narrow floats, and spares it work that it repeats.

As of Triton 3.9 it narrows float32 to bfloat16 by cutting bits off, loses the carry where rounding reaches the next
power of two, reads infinities and NaN of eight bits as numbers, multiplies the bit patterns of bfloat16 tiles as
integers, and takes integers that become bfloat16 for such patterns. It also prepares the language anew for every call
of a function such as `tl.sum`, and computes every sum of int32 a second time in int64; together that is half of its
time. Knows no kernel.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Array = np.ndarray[Any, Any]

_FLOATS: dict[Any, Any] = {
    tl.float64: np.float64,
    tl.float32: np.float32,
    tl.float16: np.float16,
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
    tl.float8e4b8: ml_dtypes.float8_e4m3fnuz,
    tl.float8e5b16: ml_dtypes.float8_e5m2fnuz,
}


def correct_interpreter() -> None:
    """Put all of it in place; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder.create_dot, "corrected", False):
        return
    interpreter._convert_float = _rounding_to_even(interpreter._convert_float)
    builder.create_dot = _multiplying_numbers(builder.create_dot)
    builder.create_si_to_fp = _from_integers(builder.create_si_to_fp)
    interpreter._patch_lang = _preparing_once(interpreter._patch_lang)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _rounding_to_even(original: Any) -> Any:
    def convert(values: Array, source: Any, target: Any, rounding: Any) -> Array:
        """Bits of `source` floats -> bits of `target` floats of the same shape."""
        toward_zero = rounding is not None and rounding != interpreter._ir.ROUNDING_MODE.RTNE
        if toward_zero or source not in _FLOATS or target not in _FLOATS:
            return original(values, source, target, rounding)
        floats = np.ascontiguousarray(values).view(_FLOATS[source])
        with np.errstate(over="ignore", invalid="ignore"):
            return floats.astype(np.float32).astype(_FLOATS[target]).view(f"uint{target.primitive_bitwidth}")

    return convert


def _multiplying_numbers(original: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *modes: Any) -> Any:
        """a b + d, where operands of bfloat16 count as the numbers that they are."""
        return original(self, _widened(a), _widened(b), d, *modes)

    create_dot.corrected = True  # type: ignore[attr-defined]
    return create_dot


def _from_integers(original: Any) -> Any:
    def create_si_to_fp(self: Any, operand: Any, target: Any) -> Any:
        """Integers as floats, of bfloat16 as the numbers that they are."""
        if target.scalar != tl.bfloat16:
            return original(self, operand, target)
        return interpreter.TensorHandle(operand.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    return create_si_to_fp


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    floats = np.ascontiguousarray(operand.data).view(ml_dtypes.bfloat16).astype(np.float32)
    return interpreter.TensorHandle(floats, tl.float32)


def _preparing_once(original: Any) -> Any:
    def prepare(fn: Any) -> Any:
        """Let the language's functions run on the host, unless they do so already: within a kernel."""
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return SimpleNamespace(restore=lambda: None)
        return original(fn)

    return prepare
