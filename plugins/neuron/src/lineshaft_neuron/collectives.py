"""Collectives inside programs: torch's functional operators over groups whose names are the same on every rank.

A graph names its groups and must be equal on all ranks: so a group is named after its axes, and each rank knows by that
name the group that it is a member of. What depends on the rank is held in tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from lineshaft_contract.backends import World
from lineshaft_contract.errors import LayoutError
from lineshaft_torch import collectives as kit
from lineshaft_torch.arrays import accumulator
from lineshaft_torch.collectives import members_of, tile_size

NAMESPACE = "_c10d_functional"
"""Where torch has the operators."""


@dataclass
class ProcessWorld:
    """torch's one world of process groups in this process: who uses it, how often it was opened, and its groups."""

    users: int = 0
    opened: int = 0
    names: set[str] = field(default_factory=set)


@cache
def this_process() -> ProcessWorld:
    """The one of this process, as torch has one."""
    return ProcessWorld()


class SharedWorld:
    """What sessions need to meet in torch's world: the first to enter opens it, the last to leave closes it.

    backend    what torch.distributed knows the transport by
    own_dtype  sums are made in the array's own dtype; else in float32
    """

    def __init__(self, backend: str, own_dtype: bool, timeout_s: float = 300.0) -> None:
        self.own_dtype = own_dtype
        self._backend, self._timeout = backend, timedelta(seconds=timeout_s)

    def enter(self, world: World) -> None:
        """Meet the other ranks, unless a session of this process has. Raises WorkerDied if they do not come,
        LayoutError if this process is another rank, or one of another number of ranks, already."""
        process = this_process()
        if not process.users:
            with peers("meeting all workers"):
                file = dist.FileStore(world.rendezvous, world.size)  # type: ignore[attr-defined]
                store = dist.PrefixStore(f"world {process.opened}", file)  # type: ignore[attr-defined]
                dist.init_process_group(
                    self._backend, store=store, rank=world.rank, world_size=world.size, timeout=self._timeout
                )
            process.opened += 1
        elif (dist.get_rank(), dist.get_world_size()) != (world.rank, world.size):
            raise LayoutError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()} and cannot be rank {world.rank} of "
                f"{world.size} too, since torch has one world a process; close the first engine, or use another process"
            )
        process.users += 1

    def leave(self) -> None:
        """Leave, once for each time that it was entered."""
        process = this_process()
        process.users -= 1
        if not process.users:
            for name in process.names:
                _unregister_process_group(name)  # type: ignore[arg-type]
            process.names.clear()
            dist.destroy_process_group()

    def name(self, world: World, axes: tuple[str, ...]) -> str:
        """The name of the group over some axes. Every rank of the world has to ask for the same groups in one order."""
        process, mesh = this_process(), ",".join(f"{axis}={degree}" for axis, degree in world.axes if degree > 1)
        name = f"lineshaft {'+'.join(axes)} of {mesh}"
        if name not in process.names:
            everywhere = [tuple(members_of(replace(world, rank=rank), axes)) for rank in range(world.size)]
            with peers(f"meeting over {'+'.join(axes)}"):
                made = {ranks: dist.new_group(list(ranks), self._timeout) for ranks in dict.fromkeys(everywhere)}
            _register_process_group(name, made[everywhere[world.rank]])  # type: ignore[arg-type]
            process.names.add(name)
        return name


class FunctionalGroups:
    """The groups of one session, made when first asked for."""

    def __init__(self, world: World, shared: SharedWorld, device: torch.device) -> None:
        self._world, self._shared, self._device = world, shared, device
        self._made: dict[tuple[str, ...], FunctionalGroup] = {}
        self._inside = False

    def group(self, axis: str | Sequence[str]) -> FunctionalGroup:
        """The group over one axis or several. Raises WorkerDied if the other members do not come in time."""
        axes = (axis,) if isinstance(axis, str) else tuple(axis)
        if axes not in self._made:
            ranks = members_of(self._world, axes)
            self._made[axes] = FunctionalGroup(
                axes, self._name(axes) if len(ranks) > 1 else "", len(ranks), self._shared.own_dtype,
                torch.tensor([ranks.index(self._world.rank)], dtype=torch.int32).to(self._device),
            )  # fmt: skip
        return self._made[axes]

    def _name(self, axes: tuple[str, ...]) -> str:
        if not self._inside:
            self._shared.enter(self._world)
            self._inside = True
        return self._shared.name(self._world, axes)

    def abort(self) -> None:
        """Groups wait no longer than their time."""

    def close(self) -> None:
        """Idempotent."""
        self._made = {}
        if self._inside:
            self._inside = False
            self._shared.leave()


class FunctionalGroup:
    """One rank's end of a group; results are fresh, except that a group of one hands its input back.

    index  int32[1]: this rank's place among the members
    """

    def __init__(self, axes: tuple[str, ...], name: str, size: int, own_dtype: bool, index: torch.Tensor) -> None:
        self.axes, self.name, self.size, self._own_dtype, self._index = axes, name, size, own_dtype, index

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all members."""
        if self.size == 1:
            return x
        return self._call("all_reduce", x.to(self._wide(x)), "sum").to(x.dtype)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The members' arrays, joined along `dim` in member order."""
        return x if self.size == 1 else torch.cat(self._gathered(x).unbind(), dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This member's tile, along `dim`, of the sum."""
        if self.size == 1:
            return x
        tiles = torch.stack(x.to(self._wide(x)).split(tile_size(x, dim, self, "reduce_scatter"), dim))
        return self._call("reduce_scatter_tensor", tiles, "sum", self.size)[0].to(x.dtype)

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int) -> torch.Tensor:
        """Tile i of `split_dim` goes to member i; what arrives is joined along `concat_dim` in member order."""
        if self.size == 1:
            return x
        tiles = torch.stack(x.split(tile_size(x, split_dim, self, "all_to_all"), split_dim))
        even = [1] * self.size
        return torch.cat(self._call("all_to_all_single", tiles, even, even).unbind(), concat_dim)

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """Member `src`'s array."""
        return x if self.size == 1 else self._gathered(x)[src]  # torch-neuronx has no broadcast in a program

    def permute(self, x: torch.Tensor, shift: int) -> torch.Tensor:
        """The array of the member `shift` places before this one, cyclically."""
        if shift % self.size == 0:
            return x
        return self._gathered(x).index_select(0, (self._index - shift) % self.size)[0]

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        """[members, *x.shape]."""
        return self._call("all_gather_into_tensor", x[None], self.size)

    def _call(self, op: str, x: torch.Tensor, *args: Any) -> torch.Tensor:
        ops = torch.ops._c10d_functional
        made: torch.Tensor = ops.wait_tensor(getattr(ops, op)(x.contiguous(), *args, self.name))
        return made

    def _wide(self, x: torch.Tensor) -> torch.dtype:
        return accumulator(x.dtype) if x.is_floating_point() and not self._own_dtype else x.dtype


def peers(what: str, collectives: Sequence[str] = ("all",)) -> AbstractContextManager[None]:
    """A failure of what makes `collectives`, where there are any, means that a peer is gone or stuck."""
    return kit.peers(what) if collectives else nullcontext()
