"""Collectives over mesh axes, by process groups of this kit's own: no default group, no global state.

Ranks are row-major over the axes (dp, pp, cp, ep, tp); members of a group meet in a file that all ranks share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lineshaft_contract.backends import World
from lineshaft_contract.errors import ContractViolation, LineshaftError, Unsupported, WorkerDied
from lineshaft_contract.weights import Coordinate, coordinate_at
from lineshaft_torch.arrays import accumulator

Store = Any
"""A torch.distributed store."""

Around = Callable[[Callable[[], Any]], Any]
"""Runs what it is given."""


@dataclass(frozen=True)
class Transport:
    """What moves arrays between ranks.

    connect    (store, index in the group, members, timeout) -> a torch process-group backend
    own_dtype  sums are made in the array's own dtype, where it lies; else in float32, or float64, and rounded once
    """

    name: str
    connect: Callable[[Store, int, int, timedelta], Any]
    own_dtype: bool = False


def gloo_group(store: Store, index: int, members: int, timeout: timedelta) -> Any:
    """A group of host processes."""
    return dist.ProcessGroupGloo(store, index, members, timeout)


def nccl_group(store: Store, index: int, members: int, timeout: timedelta) -> Any:
    """A group of devices: NCCL, or RCCL where torch is built for it. Raises Unsupported where torch has neither.

    A session waits `timeout` for the other ranks and aborts the group then; the group's own watch, which would end the
    process, is given twice as long.
    """
    made = getattr(dist, "ProcessGroupNCCL", None)
    if made is None:
        raise Unsupported("this torch is built without NCCL and RCCL; run one rank, or install a build for your device")
    options = made.Options()
    options._timeout = 2 * timeout
    return made(store, index, members, options)


GLOO = Transport("gloo", gloo_group)
NCCL = Transport("nccl", nccl_group, own_dtype=True)


def coordinate_of(world: World) -> Coordinate:
    """This rank's place on every axis."""
    return coordinate_at(world.axes, world.rank)


def members_of(world: World, axes: Sequence[str]) -> list[int]:
    """The ranks that share this rank's coordinate on every axis not in `axes`, row-major over `axes` as given."""
    here = coordinate_of(world)
    ranks = []
    for place in product(*(range(world.degree(axis)) for axis in axes)):
        chosen = dict(zip(axes, place, strict=True))
        rank = 0
        for axis, degree in world.axes:
            rank = rank * degree + chosen.get(axis, getattr(here, axis))
        ranks.append(rank)
    return ranks


class ProcessGroups:
    """The groups of one rank, made when first asked for. Every member has to ask for the same groups."""

    def __init__(
        self, world: World, transport: Transport, timeout_s: float, around: Around = lambda run: run()
    ) -> None:
        self._world, self._transport, self._around = world, transport, around
        self._timeout = timedelta(seconds=timeout_s)
        self._store: Store = None
        self._made: dict[tuple[str, ...], Group] = {}

    def group(self, axis: str | Sequence[str]) -> Group:
        """The group over one axis or several. Raises WorkerDied if the other members do not come in time."""
        axes = (axis,) if isinstance(axis, str) else tuple(axis)
        if axes not in self._made:
            ranks = members_of(self._world, axes)
            backend = None if len(ranks) == 1 else self._connect(axes, ranks)
            index, own = ranks.index(self._world.rank), self._transport.own_dtype
            self._made[axes] = Group(axes, index, len(ranks), backend, own_dtype=own, around=self._around)
        return self._made[axes]

    def _connect(self, axes: tuple[str, ...], ranks: list[int]) -> Any:
        with peers(f"meeting over {'+'.join(axes)}"):
            store, _ = self.meeting(axes)
            return self._transport.connect(store, ranks.index(self._world.rank), len(ranks), self._timeout)

    def meeting(self, axis: str | Sequence[str], purpose: str = "") -> tuple[Store, str]:
        """A store that the members over these axes alone share, for one purpose, and its name."""
        axes = (axis,) if isinstance(axis, str) else tuple(axis)
        if self._store is None:
            self._store = dist.FileStore(self._world.rendezvous, self._world.size)  # type: ignore[attr-defined]
            self._store.set_timeout(self._timeout)
        name = f"{purpose}{'+'.join(axes)}:{','.join(map(str, members_of(self._world, axes)))}"
        return dist.PrefixStore(name, self._store), name  # type: ignore[attr-defined]

    def abort(self) -> None:
        """Give up what the groups wait for, as far as their transport can."""
        for group in self._made.values():
            group.abort()

    def close(self) -> None:
        for group in self._made.values():
            group.close()
        self._made, self._store = {}, None


class Group:
    """One rank's end of a group: `index` of `size` members. Inputs are left alone; results are fresh, except that a
    group of one hands its input back.

    Sums are made as the transport asks for; all else moves bytes, so that any dtype goes. `around` runs what the
    transport does.
    """

    def __init__(
        self,
        axes: tuple[str, ...],
        index: int,
        size: int,
        backend: Any,
        *,
        own_dtype: bool = False,
        around: Around = lambda run: run(),
    ) -> None:
        self.axes, self.index, self.size, self.own_dtype = axes, index, size, own_dtype
        self._backend, self._around = backend, around

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all members."""
        if self.size == 1:
            return x
        wide = accumulator(x.dtype) if x.is_floating_point() and not self.own_dtype else x.dtype
        total = x.to(wide, copy=True).contiguous()
        self._wait("all_reduce", lambda b: b.allreduce([total]))
        return total.to(x.dtype)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The members' arrays, joined along `dim` in member order."""
        if self.size == 1:
            return x
        mine = _as_bytes(x)
        parts = mine.new_empty((self.size, mine.numel()))
        self._wait("all_gather", lambda b: b._allgather_base(parts.view(-1), mine))
        return torch.cat([_from_bytes(part, x.dtype, x.shape) for part in parts], dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This member's tile, along `dim`, of the sum."""
        if self.size == 1:
            return x
        share = tile_size(x, dim, self, "reduce_scatter")
        if self.own_dtype:
            tiles = torch.stack(x.split(share, dim))
            got = torch.empty_like(tiles[0])
            self._wait("reduce_scatter", lambda b: b._reduce_scatter_base(got.view(-1), tiles.view(-1)))
            return got
        return self.all_reduce(x).narrow(dim, self.index * share, share).contiguous()

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int) -> torch.Tensor:
        """Tile i of `split_dim` goes to member i; what arrives is joined along `concat_dim` in member order."""
        if self.size == 1:
            return x
        tiles = x.split(tile_size(x, split_dim, self, "all_to_all"), split_dim)
        sent = torch.stack([_as_bytes(tile) for tile in tiles])
        got = torch.empty_like(sent)
        self._wait("all_to_all", lambda b: b.alltoall_base(got, sent, [], []))
        return torch.cat([_from_bytes(part, x.dtype, tiles[0].shape) for part in got], concat_dim)

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """Member `src`'s array."""
        if self.size == 1:
            return x
        moved = _as_bytes(x).clone()
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._wait("broadcast", lambda b: b.broadcast([moved], options))
        return _from_bytes(moved, x.dtype, x.shape)

    def permute(self, x: torch.Tensor, shift: int) -> torch.Tensor:
        """The array of the member `shift` places before this one, cyclically."""
        if shift % self.size == 0:
            return x
        mine = _as_bytes(x)
        got = torch.empty_like(mine)
        target, source = (self.index + shift) % self.size, (self.index - shift) % self.size
        takes, gives = ([mine.numel() * (other == member) for other in range(self.size)] for member in (source, target))
        self._wait("permute", lambda b: b.alltoall_base(got, mine, takes, gives))
        return _from_bytes(got, x.dtype, x.shape)

    def abort(self) -> None:
        if self._backend is not None and hasattr(self._backend, "abort"):
            self._backend.abort()

    def close(self) -> None:
        self._backend = None

    def _wait(self, op: str, submit: Callable[[Any], Any]) -> None:
        """Submit an operation of the transport and wait for it."""

        def run() -> None:
            with peers(f"{op} over {'+'.join(self.axes)}"):
                submit(self._backend).wait()

        self._around(run)


class Members(Protocol):
    """What is asked of a group: the axes that it is over, and how many its members are."""

    axes: tuple[str, ...]
    size: int


def tile_size(x: torch.Tensor, dim: int, group: Members, op: str) -> int:
    """A member's share of a dim. Raises ContractViolation where the members do not divide it."""
    if x.shape[dim] % group.size:
        raise ContractViolation(
            f"{op} over {'+'.join(group.axes)}: the {group.size} members do not divide dim {dim} of {list(x.shape)}"
        )
    return int(x.shape[dim]) // group.size


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _from_bytes(raw: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    return raw.view(dtype).view(tuple(shape))


@contextmanager
def peers(what: str) -> Iterator[None]:
    """A failure of the transport means that a peer is gone or stuck."""
    try:
        yield
    except LineshaftError:
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise WorkerDied(f"{what}: another worker ended or does not answer ({text}); restart the run") from error
