"""Finding and replacing the tensors in what ops take and return: tensors, sequences, mappings and caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import ArraySpec
from lineshaft_torch.arrays import dtype_name, torch_dtype


def map_tensors(fn: Callable[[torch.Tensor], Any], item: Any) -> Any:
    """`item` with every tensor in it replaced; weights, steps and statics stay as they are."""
    if isinstance(item, torch.Tensor):
        return fn(item)
    if isinstance(item, (tuple, list)):
        return type(item)(map_tensors(fn, part) for part in item)
    if isinstance(item, dict):
        return {key: map_tensors(fn, part) for key, part in item.items()}
    if isinstance(item, Cache):
        return replace(item, arrays=map_tensors(fn, item.arrays))
    return item


def tensors_in(item: Any) -> list[torch.Tensor]:
    """Every tensor in `item`, in a defined order."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, item)
    return found


def storage_key(tensor: torch.Tensor) -> int:
    """Identifies the memory behind a tensor: equal for two views of one storage, unique while that storage lives."""
    return int(tensor.untyped_storage()._cdata)


def storage_keys(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {storage_key(tensor) for tensor in tensors}


def spec_of(tensor: torch.Tensor) -> ArraySpec:
    return ArraySpec(tuple(tensor.shape), dtype_name(tensor.dtype))


def view_at(buffer: torch.Tensor, offset: int, spec: ArraySpec) -> torch.Tensor:
    """The array of `spec` at byte `offset` of `buffer` (uint8)."""
    dtype = torch_dtype(spec.dtype)
    count = 1
    for n in spec.shape:
        count *= n
    return buffer[offset : offset + count * dtype.itemsize].view(dtype).view(spec.shape)
