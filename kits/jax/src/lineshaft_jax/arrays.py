"""Dtype names, JAX arrays and host arrays, converted into one another without changing a value."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import numpy_dtype

Array = jax.Array
HostArray = np.ndarray[Any, Any]

DTYPES = (
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool",
)  # fmt: skip
"""Names that JAX knows as they are, without its 64-bit mode, in which every default dtype would be another."""

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def jax_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a contract dtype name. Raises ContractViolation for one that arrays here cannot have."""
    if name not in DTYPES:
        raise ContractViolation(f"dtype {name!r} is none that arrays of this kit have; use one of {', '.join(DTYPES)}")
    return numpy_dtype(name)


def dtype_name(array: Any) -> str:
    """The contract's name of an array's dtype."""
    return str(array.dtype.name)


def to_host(array: Array) -> HostArray:
    """A private NumPy copy; bfloat16 and fp8 arrive as ml_dtypes types."""
    return np.array(array)


def as_bits(x: Array) -> Array:
    """x as unsigned integers of its width."""
    return lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])


def movable(x: Array) -> Array:
    """x, as bits where it is narrower than 32 bits: XLA on the CPU updates arrays of narrow floats by way of copies in
    float32."""
    return as_bits(x) if x.dtype.itemsize < 4 else x


def of_dtype(bits: Array, dtype: str) -> Array:
    """What `as_bits` made of an array of `dtype`, as that array again; an array of that dtype passes."""
    wanted = jax_dtype(dtype)
    return bits if bits.dtype == wanted else lax.bitcast_convert_type(bits, wanted)


def widened(x: Array) -> Array:
    """x in float32, the accumulation dtype."""
    return x.astype(jnp.float32)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple
