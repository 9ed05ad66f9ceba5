"""Dtype names, NumPy arrays and torch tensors, converted into one another without changing a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import numpy_dtype

HostArray = np.ndarray[Any, Any]

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "int64", "int32", "int16", "int8", "uint32", "uint8", "bool",
)  # fmt: skip
"""Names that NumPy (with ml_dtypes) and torch share."""

_CARRIERS: dict[int, np.dtype[Any]] = {1: np.dtype(np.uint8), 2: np.dtype(np.int16), 4: np.dtype(np.int32)}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a contract dtype name. Raises ContractViolation for a name that torch has no dtype for."""
    if name not in DTYPES:
        raise ContractViolation(f"dtype {name!r} is none that torch and NumPy share; use one of {', '.join(DTYPES)}")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The contract's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float64 for float64, float32 for every narrower float."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def from_host(array: HostArray) -> torch.Tensor:
    """A CPU tensor that shares the memory of `array`, or of a copy where torch could not write to it."""
    owned = np.require(array, requirements=["C", "W"])
    name = array.dtype.name
    if name in ("bfloat16", "uint32") or name.startswith("float8"):
        carrier = _CARRIERS[array.dtype.itemsize]
        return torch.from_numpy(owned.view(carrier)).view(torch_dtype(name))
    return torch.from_numpy(owned)


def to_host(tensor: torch.Tensor) -> HostArray:
    """A private NumPy copy of a tensor; bfloat16 and fp8 arrive as ml_dtypes types."""
    return host_view(tensor.detach().to("cpu", copy=True).contiguous())


def host_view(tensor: torch.Tensor) -> HostArray:
    """A NumPy array that shares the memory of a contiguous CPU tensor."""
    name = dtype_name(tensor.dtype)
    if name in ("bfloat16", "uint32") or name.startswith("float8"):
        carrier = getattr(torch, _CARRIERS[tensor.dtype.itemsize].name)
        return tensor.view(carrier).numpy().view(numpy_dtype(name))
    return tensor.numpy()
