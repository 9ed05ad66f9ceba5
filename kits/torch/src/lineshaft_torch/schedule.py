"""How a tape is cut into graphs, and which of its calls run beside others. Knows calls and memory, no device's work.

Collectives may run on a stream of their own: the main stream waits for one before the first later call that reads what
it writes, or writes what it reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lineshaft_torch.device import DeviceLayer, Event
from lineshaft_torch.recording import TapeCall
from lineshaft_torch.tensors import storage_key

Extent = tuple[int, int, int]
"""(storage, first byte, end): memory that a tensor lies in, gaps between its rows included."""


@dataclass(frozen=True)
class Piece:
    """Calls that follow one another, to be captured as one graph or to be made anew in every step."""

    calls: tuple[TapeCall, ...]
    graphed: bool


@dataclass(frozen=True)
class Run:
    """Make calls on the main stream."""

    calls: tuple[TapeCall, ...]


@dataclass(frozen=True)
class Fork:
    """Make a call on the side stream, after all that the main stream was given before."""

    call: TapeCall


@dataclass(frozen=True)
class Join:
    """Let the main stream wait for the forked `call`, and so for those that were forked before it."""

    call: TapeCall


Move = Run | Fork | Join


def cut(calls: Sequence[TapeCall], graphed: Callable[[TapeCall], bool]) -> list[Piece]:
    """Maximal runs of calls that are all `graphed`, or all not."""
    return [Piece(tuple(run), kind) for kind, run in groupby(calls, graphed)]


def moves_of(calls: Sequence[TapeCall], beside: frozenset[str]) -> list[Move]:
    """How to make `calls`, those of the ops `beside` on the side stream. All forks are joined in the end."""
    moves: list[Move] = []
    flying: list[TapeCall] = []
    for call in calls:
        met = [i for i, other in enumerate(flying) if conflict(other, call)]
        if met:
            moves.append(Join(flying[met[-1]]))
            del flying[: met[-1] + 1]
        if call.op in beside:
            moves.append(Fork(call))
            flying.append(call)
        elif moves and isinstance(moves[-1], Run):
            moves[-1] = Run((*moves[-1].calls, call))
        else:
            moves.append(Run((call,)))
    return [*moves, Join(flying[-1])] if flying else moves


def conflict(earlier: TapeCall, later: TapeCall) -> bool:
    """Whether `later` must wait for `earlier`: it touches what that writes, or writes what that reads."""
    return overlap(earlier.writes, (*later.reads, *later.writes)) or overlap(earlier.reads, later.writes)


def overlap(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether any of some tensors may share memory with any of others."""
    theirs = [extent(tensor) for tensor in others]
    return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in map(extent, some) for b in theirs)


def extent(tensor: torch.Tensor) -> Extent:
    """Where a tensor lies."""
    start = int(tensor.storage_offset()) * tensor.itemsize
    if tensor.numel() == 0:
        return storage_key(tensor), start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return storage_key(tensor), start, start + int(last + 1) * tensor.itemsize


def play(layer: DeviceLayer, moves: Sequence[Move], before: Callable[[TapeCall], None] | None = None) -> None:
    """Make the moves, from the main stream; `before` is told of each call that is about to be made."""
    done: dict[int, Event] = {}
    for move in moves:
        if isinstance(move, Run):
            launch(layer, move.calls, before)
        elif isinstance(move, Join):
            layer.wait(done[id(move.call)])
        else:
            ready = layer.record()
            with layer.on(layer.side):
                layer.wait(ready)
                launch(layer, (move.call,), before)
                done[id(move.call)] = layer.record()


def launch(layer: DeviceLayer, calls: Sequence[TapeCall], before: Callable[[TapeCall], None] | None) -> None:
    """Make calls on the current stream."""
    if before is None:
        layer.launch(calls)
        return
    for call in calls:
        before(call)
        layer.launch((call,))
