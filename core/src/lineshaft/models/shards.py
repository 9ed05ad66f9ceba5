"""Shard functions: which rows or columns of which checkpoint tensors make up one coordinate's parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lineshaft.errors import MisshapenTensor
from lineshaft_contract.schemes import PLAIN, dequantize
from lineshaft_contract.weights import Checkpoint, Coordinate, Local, Stored

Range = Callable[[Coordinate], tuple[int, int]]
Shard = Callable[[Checkpoint, Coordinate], Local]
Numbers = np.ndarray[Any, Any]


def check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """Raises MissingTensor or MisshapenTensor unless the checkpoint holds `name` with this shape."""
    found = tuple(checkpoint.shape(name))
    if found != shape:
        raise MisshapenTensor(f"tensor {name} has shape {list(found)}, the model's config asks for {list(shape)}")


def rows(*parts: tuple[str, tuple[int, ...], Range]) -> Shard:
    """Cut rows ("out") of each (name, full shape, range) and join the parts: cut first, joined after."""

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        for name, shape, _ in parts:
            check_shape(checkpoint, name, shape)
        return Local(tuple(checkpoint.rows(name, *where(at)) for name, _, where in parts))

    return shard


def cols(name: str, shape: tuple[int, ...], where: Range) -> Shard:
    """Cut columns ("in") of one tensor."""

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        check_shape(checkpoint, name, shape)
        return Local((checkpoint.cols(name, *where(at)),))

    return shard


def whole(name: str, shape: tuple[int, ...]) -> Shard:
    """The whole tensor on every rank."""
    return rows((name, shape, all_of(shape[0])))


def all_of(size: int) -> Range:
    """All of `size`, on every rank."""
    return lambda at: (0, size)


def even(size: int, ranks: int) -> Range:
    """This rank's part of `size`, which is cut evenly over the ranks of tp."""
    share = size // ranks
    return lambda at: (at.tp * share, (at.tp + 1) * share)


def joined(*parts: Shard) -> Shard:
    """The parts of several shard functions, one after another."""
    return lambda checkpoint, at: Local(tuple(part for shard in parts for part in shard(checkpoint, at).parts))


def made(make: Callable[..., Iterable[Numbers]], *tensors: tuple[str, tuple[int, ...]]) -> Shard:
    """What `make(coordinate, *whole tensors)` cuts, for layouts that rows and columns do not tell: arrays to be joined.
    `tensors` gives (name, full shape) of each.

    Plain numbers are as they are stored, mapped and read only where `make` looks; blocks come in float32.
    """

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        for name, shape in tensors:
            check_shape(checkpoint, name, shape)
        whole = (checkpoint.rows(name, 0, shape[0]) for name, shape in tensors)
        numbers = (item.arrays["data"] if item.scheme == PLAIN else dequantize(item, "float32") for item in whole)
        return Local(tuple(Stored(PLAIN, data.shape, {"data": data}) for data in make(at, *numbers)))

    return shard


def moved(where: Range, start: int) -> Range:
    """`where` in a tensor that holds what it cuts from row `start` on."""

    def place(at: Coordinate) -> tuple[int, int]:
        first, stop = where(at)
        return start + first, start + stop

    return place


def shifted(name: str, shape: tuple[int, ...], offset: float) -> Shard:
    """The whole tensor plus a number, in float32, on every rank."""

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        check_shape(checkpoint, name, shape)
        data = dequantize(checkpoint.rows(name, 0, shape[0]), "float32") + np.float32(offset)
        return Local((Stored("none", data.shape, {"data": data}),))

    return shard


def on_first(name: str, size: int) -> Shard:
    """A vector [size] on the first tp rank and zeros on the others: what is added once to a sum over ranks."""

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        check_shape(checkpoint, name, (size,))
        zeros = Stored("none", (size,), {"data": np.zeros(size, np.float32)})
        return Local((zeros if at.tp else checkpoint.rows(name, 0, size),))

    return shard


def padded_rows(name: str, shape: tuple[int, int], share: int) -> Shard:
    """`share` rows per tp rank, with zero rows past the end of the tensor."""

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        check_shape(checkpoint, name, shape)
        start, stop = min(at.tp * share, shape[0]), min((at.tp + 1) * share, shape[0])
        parts = [checkpoint.rows(name, start, stop)] if stop > start else []
        missing = share - (stop - start)
        if missing:
            zeros = np.zeros((missing, shape[1]), np.float32)
            parts.append(Stored("none", zeros.shape, {"data": zeros}))
        return Local(tuple(parts))

    return shard


def constant(value: Callable[[Coordinate], list[int]]) -> Shard:
    """int32 numbers that depend on the coordinate."""

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        data = np.asarray(value(at), np.int32)
        return Local((Stored("none", data.shape, {"data": data}),))

    return shard
