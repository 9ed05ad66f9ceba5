"""A program's inputs on the device: one array per dtype, since a step is sent in as few transfers as there are arrays.

Knows nothing of what the inputs mean. Unsigned integers travel as signed ones of the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from lineshaft_contract.steps import HostStep, InputField, InputLayout
from lineshaft_torch.arrays import HostArray, from_host, torch_dtype

CARRIERS = {"uint32": "int32"}
"""The dtype in which values of another travel."""


class PackedInputs:
    """The inputs of `layout`, all zero at first. `arrays` {dtype: [values of all fields of that dtype]} stay where they
    are; `take` fills them."""

    def __init__(self, layout: InputLayout, device: torch.device) -> None:
        self._fields: dict[str, list[InputField]] = {}
        for field in layout.fields:
            self._fields.setdefault(CARRIERS.get(field.dtype, field.dtype), []).append(field)
        self._host: dict[str, HostArray] = {
            dtype: np.zeros(sum(math.prod(field.shape) for field in fields), dtype)
            for dtype, fields in self._fields.items()
        }
        self.arrays = {
            dtype: torch.zeros(host.shape, dtype=torch_dtype(dtype), device=device)
            for dtype, host in self._host.items()
        }

    def take(self, step: HostStep) -> None:
        """Send a step's values to the device; the step is free when this returns."""
        for dtype, fields in self._fields.items():
            host = self._host[dtype]
            np.concatenate([step[field.name].reshape(-1).view(dtype) for field in fields], out=host)
            self.arrays[dtype].copy_(from_host(host))

    def views(self) -> dict[str, torch.Tensor]:
        """Each input by name, cut out of the arrays."""
        found = {}
        for dtype, fields in self._fields.items():
            start = 0
            for field in fields:
                stop = start + math.prod(field.shape)
                found[field.name] = self.arrays[dtype][start:stop].view(field.shape)
                start = stop
        return found
