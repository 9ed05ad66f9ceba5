"""Arrays of a tape that is being recorded: shapes, strides and the buffer that they will lie in, but no values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.problems import itemsize
from lineshaft_contract.restricted import Restricted, violate
from lineshaft_contract.steps import ArraySpec

FOREIGN = 'a kernel that works on PyTorch\'s tensors needs backend_options engine = "torch"'


class Buffer:
    """Memory of `nbytes`: `held`, which lies where it is, or a part of the arena that is placed once the tape is whole.

    first, last   the steps of the tape between which a part of the arena is in use
    """

    __slots__ = ("address", "first", "held", "last", "nbytes")

    def __init__(self, nbytes: int, held: HostArray | None = None) -> None:
        self.nbytes, self.held = nbytes, held
        self.address = 0 if held is None else held.ctypes.data
        self.first = self.last = -1


class TapeArray(Restricted):
    """A view of a buffer: `offset` in bytes, `strides` in values.

    live    an int32[1] of the step's inputs that counts the tokens which are not padding, where rows of the first dim
            belong to tokens; None where all rows count
    """

    __slots__ = ("_shape", "buffer", "dtype", "live", "offset", "strides")

    def __init__(
        self,
        buffer: Buffer,
        shape: Sequence[int],
        dtype: str,
        strides: Sequence[int] | None = None,
        offset: int = 0,
        live: TapeArray | None = None,
    ) -> None:
        self.buffer, self.dtype, self.offset, self.live = buffer, dtype, offset, live
        self._shape = tuple(shape)
        self.strides = packed_strides(self._shape) if strides is None else tuple(strides)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def spec(self) -> ArraySpec:
        return ArraySpec(self._shape, self.dtype)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self._shape)

    @property
    def itemsize(self) -> int:
        return itemsize(self.dtype)

    @property
    def dense(self) -> bool:
        """Whether the values lie one after another."""
        packed = packed_strides(self._shape)
        return self.strides == packed or all(
            n == 1 or own == step for n, own, step in zip(self._shape, self.strides, packed, strict=True)
        )

    @property
    def address(self) -> int:
        """Where the first value lies, once the buffer is placed."""
        return self.buffer.address + self.offset

    def values(self) -> HostArray:
        """The values in place, once the buffer is placed; of a buffer of the arena as long as the arena lives."""
        return view_at(self.address, self._shape, self.dtype, self.strides)

    def row_bytes(self) -> int:
        """Bytes from one index of the first dim to the next."""
        return self.strides[0] * self.itemsize

    def __getattr__(self, name: str) -> NoReturn:
        try:
            super().__getattr__(name)
        except ContractViolation as error:
            raise ContractViolation(f"{error}; {FOREIGN}") from None

    def _reshaped(self, shape: tuple[int, ...]) -> TapeArray:
        strides = packed_strides(shape) if self.dense else restrided(self._shape, self.strides, shape)
        if strides is None:
            violate(f"reshape of a slice of shape {list(self._shape)} to {list(shape)}, which would need a copy")
        live = self.live if shape[:1] == self._shape[:1] else None
        return TapeArray(self.buffer, shape, self.dtype, strides, self.offset, live)

    def _sliced(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> TapeArray:
        starts = (item.start or 0 for item in index)
        offset = sum(start * stride for start, stride in zip(starts, self.strides, strict=False)) * self.itemsize
        live = self.live if shape[:1] == self._shape[:1] else None
        return TapeArray(self.buffer, shape, self.dtype, self.strides, self.offset + offset, live)


@lru_cache
def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in values, of an array whose values lie one after another."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def restrided(old: Sequence[int], strides: Sequence[int], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The strides under which a strided array of shape `old` has the shape `shape`; None if there are none."""
    if 0 in shape:
        return packed_strides(tuple(shape))
    runs: list[list[int]] = []  # [size, stride of the innermost] of dims that lie one after another
    for size, stride in zip(old, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    out: list[int] = []
    left = list(runs)
    room = left[0][0] if left else 1
    for size in shape:
        if size == 1:
            out.append(1)
            continue
        while left and room == 1:
            left.pop(0)
            room = left[0][0] if left else 1
        if not left or room % size:
            return None
        room //= size
        out.append(left[0][1] * room)
    return tuple(out)


def view_at(address: int, shape: Sequence[int], dtype: str, strides: Sequence[int] | None = None) -> HostArray:
    """The values at an address as an array, strides in values; whoever owns the memory has to outlive it."""
    kind = numpy_dtype(dtype)
    steps = packed_strides(tuple(shape)) if strides is None else strides
    if math.prod(shape) == 0:
        return np.zeros(tuple(shape), kind)
    extent = (sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1) * kind.itemsize
    raw: Any = np.ctypeslib.as_array((_bytes * extent).from_address(address))
    return np.ndarray(tuple(shape), kind, raw, strides=[step * kind.itemsize for step in steps])


_bytes: Any = np.ctypeslib.as_ctypes_type(np.uint8)
