"""Shard functions: which rows or columns of which checkpoint tensors make up one coordinate's parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
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


def even(count: int, ranks: int, width: int = 1) -> Range:
    """This rank's part of `count` heads (or rows) of `width` values each, cut evenly over the ranks of tp; where there
    are fewer heads than ranks, neighbours have the same one."""
    share = max(1, count // ranks) * width

    def place(at: Coordinate) -> tuple[int, int]:
        start = at.tp * count // ranks * width
        return start, start + share

    return place


def stacked(parts: Sequence[tuple[str, int, Range]], tail: tuple[int, ...], fused: str = "") -> Shard:
    """Rows of each (name, rows of the whole, range), cut first and joined after; `fused` names the one tensor that
    holds the parts one after another, where the checkpoint has it. `tail`: the sizes of a row, () in a vector."""
    if fused:
        *starts, size = accumulate((size for _, size, _ in parts), initial=0)
        parts = [(fused, size, _after(start, where)) for start, (_, _, where) in zip(starts, parts, strict=True)]
    return rows(*((name, (size, *tail), where) for name, size, where in parts))


def _after(start: int, where: Range) -> Range:
    """A range as seen from `start` rows before it."""
    return lambda at: (start + where(at)[0], start + where(at)[1])


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
        return Local(tuple(map(_plain, make(at, *numbers))))

    return shard


def shifted(name: str, shape: tuple[int, ...], offset: float) -> Shard:
    """The whole tensor plus a number, in float32, on every rank."""
    return made(lambda at, data: [data.astype(np.float32) + np.float32(offset)], (name, shape))


def on_first(name: str, shape: tuple[int, ...]) -> Shard:
    """A tensor on the first tp rank and zeros on the others: what is added once to a sum over ranks."""
    return made(lambda at, data: [np.zeros_like(data) if at.tp else data], (name, shape))


def padded_rows(name: str, shape: tuple[int, int], share: int) -> Shard:
    """`share` rows per tp rank, with zero rows past the end of the tensor."""

    def shard(checkpoint: Checkpoint, at: Coordinate) -> Local:
        check_shape(checkpoint, name, shape)
        start, stop = min(at.tp * share, shape[0]), min((at.tp + 1) * share, shape[0])
        parts = [checkpoint.rows(name, start, stop)] if stop > start else []
        if missing := share - (stop - start):
            parts.append(_plain(np.zeros((missing, shape[1]), np.float32)))
        return Local(tuple(parts))

    return shard


def constant(value: Callable[[Coordinate], list[int]]) -> Shard:
    """int32 numbers that depend on the coordinate."""
    return lambda checkpoint, at: Local((_plain(np.asarray(value(at), np.int32)),))


def _plain(data: Numbers) -> Stored:
    return Stored(PLAIN, data.shape, {"data": data})
