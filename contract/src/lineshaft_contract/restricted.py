"""What a forward may do with an array: `.shape`, `.reshape` to static sizes, static basic slices. Nothing else."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from lineshaft_contract.errors import ContractViolation


class Restricted:
    """Base of arrays that enforce the rule; a subclass has `shape` and makes itself anew in `_reshaped`, `_sliced`."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        raise AssertionError("a subclass gives the shape")

    def _reshaped(self, shape: tuple[int, ...]) -> Any:
        raise AssertionError("a subclass reshapes")

    def _sliced(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> Any:
        raise AssertionError("a subclass slices")

    def reshape(self, *shape: int) -> Any:
        """Raises ContractViolation unless all sizes are Python ints and their product fits."""
        if any(type(n) is not int or n < 0 for n in shape):
            violate(f"reshape{shape}: every bound must be a Python int of at least 0")
        if math.prod(self.shape) != math.prod(shape):
            violate(f"reshape of {list(self.shape)} to {list(shape)}: another number of values")
        return self._reshaped(shape)

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        return self._sliced(index, sliced(self.shape, index))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own protocols ask by this name whether something is there
            raise AttributeError(name)
        violate(f".{name} of an array: a forward may use .shape, .reshape and static slices only")

    def _no_arithmetic(self, *_: Any) -> NoReturn:
        violate("arithmetic, comparison or truth of an array: a forward computes through ops only")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _no_arithmetic
    __lt__ = __gt__ = __le__ = __ge__ = __bool__ = __iter__ = __len__ = __neg__ = _no_arithmetic


def violate(what: str) -> NoReturn:
    """Raises ContractViolation."""
    raise ContractViolation(f"the forward breaks the op contract: {what}")


def sliced(shape: tuple[int, ...], index: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of `array[index]`; raises ContractViolation for anything but non-negative, unit-stride slices."""
    if len(index) > len(shape):
        violate(f"{len(index)} indices into an array of {len(shape)} dims")
    out = []
    for size, item in zip(shape, index, strict=False):
        if not isinstance(item, slice) or item.step is not None:
            violate(f"index {item!r}: only slices without a step are allowed")
        start, stop = (0 if item.start is None else item.start), (size if item.stop is None else item.stop)
        if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= size:
            violate(f"slice {start}:{stop} of a dim of size {size}: bounds are Python ints within the dim")
        out.append(stop - start)
    return (*out, *shape[len(index) :])
