"""Where the ranks of a session are: a mesh of devices with the axes of `World`, and arrays placed on it.

An array that differs from rank to rank is one global array, the ranks' own joined along dim 0 and cut there over all
axes, so that each rank's program sees exactly its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lineshaft_contract.backends import World
from lineshaft_contract.errors import LayoutError
from lineshaft_contract.weights import Coordinate, coordinate_at
from lineshaft_jax.arrays import HostArray


def mesh_of(world: World, devices: Sequence[Any]) -> Mesh:
    """A mesh of the worker's ranks. `devices` are those of all ranks, in their order.

    Raises LayoutError where the ranks are no whole block of the innermost axes, or where there are too few devices.
    """
    degrees = [degree for _, degree in world.axes]
    first = next((i for i in range(len(degrees) + 1) if math.prod(degrees[i:]) == world.ranks), None)
    if first is None:
        raise LayoutError(f"{world.ranks} ranks are no block of the innermost axes of {dict(world.axes)}")
    if len(devices) < world.rank + world.ranks:
        raise LayoutError(
            f"the layout {dict(world.axes)} has {world.size} ranks, there are {len(devices)} devices; lower a degree"
        )
    shape = [1] * first + degrees[first:]
    own = np.array(devices[world.rank : world.rank + world.ranks], dtype=object)
    return Mesh(own.reshape(shape), tuple(axis for axis, _ in world.axes))


def coordinates_of(world: World) -> list[Coordinate]:
    """The place of each of the worker's ranks on every axis, in their order."""
    return [coordinate_at(world.axes, rank) for rank in range(world.rank, world.rank + world.ranks)]


class Placement:
    """Puts host arrays on a mesh. `shared` arrays are equal on all ranks, `own` ones are each rank's."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.ranks = int(mesh.size)

    @cached_property
    def shared(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(own=False))

    @cached_property
    def own(self) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(own=True))

    def spec(self, *, own: bool) -> PartitionSpec:
        return PartitionSpec(self.mesh.axis_names) if own else PartitionSpec()

    def put(self, values: HostArray) -> jax.Array:
        """One array for all ranks; a copy."""
        return jax.device_put(values, self.shared, may_alias=False)

    def put_own(self, values: Sequence[HostArray]) -> jax.Array:
        """One array of each rank, all of one shape; a copy."""
        parts = [
            jax.device_put(value, device, may_alias=False)
            for value, device in zip(values, self.mesh.devices.flat, strict=True)
        ]
        shape = (self.ranks * values[0].shape[0], *values[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.own, parts)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Zeros of that shape on each rank, committed."""
        return _zeros(self.own, self.joined(shape), dtype)()

    def joined(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The global shape of arrays that are `shape` on each rank."""
        return (self.ranks * shape[0], *shape[1:])

    def program(self, run: Callable[..., Any], own: tuple[Any, ...], donate: Sequence[int] = ()) -> Any:
        """`run` on every rank, as a jitted function. `own` says of each argument, or of each leaf of one, whether it is
        each rank's own or shared; results are each rank's own."""
        wrapped = run
        if self.ranks > 1:
            in_specs = jax.tree.map(lambda flag: self.spec(own=flag), own)
            wrapped = jax.shard_map(
                run, mesh=self.mesh, in_specs=in_specs, out_specs=self.spec(own=True), check_vma=False
            )
        shardings = jax.tree.map(lambda flag: self.own if flag else self.shared, own)
        return jax.jit(wrapped, in_shardings=shardings, out_shardings=self.own, donate_argnums=tuple(donate))


@lru_cache(maxsize=256)
def _zeros(sharding: NamedSharding, shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def shards(array: jax.Array, *, first: bool = False) -> list[HostArray]:
    """A private host copy of each rank's own part, in their order, or of the first rank's alone."""
    parts = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [np.array(part.data) for part in (parts[:1] if first else parts)]
