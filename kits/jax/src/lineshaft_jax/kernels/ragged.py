"""Groups of items that lie one after another in one array, and a loop over blocks of them that does no more than there
is to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lineshaft_jax.arrays import Array, movable, of_dtype

Tree = Any
"""Nested tuples of arrays."""


@dataclass(frozen=True)
class Blocks:
    """Groups of `total` items at most, cut into blocks of `size`.

    starts  int32[G + 1], non-decreasing: group g has items starts[g] to starts[g + 1]
    """

    starts: Array
    total: int
    size: int

    def map(self, run: Callable[[Array, Array], Tree]) -> Tree:
        """Arrays [total, ...] of what `run(group int32[], begin int32[])` gives for the block of items begin to
        begin + size of a group, arrays [size, ...]. Items outside of every group mean nothing.

        A block may write past the end of its group: blocks that own these items come later.
        """
        ends = jnp.cumsum(-(-jnp.diff(self.starts) // self.size))

        def body(i: Array, outs: Tree) -> Tree:
            group = jnp.minimum(jnp.sum(ends <= i), ends.shape[0] - 1)
            before = jnp.where(group > 0, ends[group - 1], 0)
            begin = self.starts[group] + (i - before) * self.size

            def put(out: Array, block: Array) -> Array:
                return lax.dynamic_update_slice_in_dim(out, movable(block), begin, 0)

            return jax.tree.map(put, outs, run(group, begin))

        kinds = jax.eval_shape(run, jnp.int32(0), jnp.int32(0))
        outs = jax.tree.map(self._room, kinds)
        outs = lax.fori_loop(0, ends[-1], body, outs)
        return jax.tree.map(lambda out, kind: of_dtype(out[: self.total], kind.dtype.name), outs, kinds)

    def _room(self, kind: Any) -> Array:
        return movable(jnp.zeros((self.total + self.size, *kind.shape[1:]), kind.dtype))

    def cut(self, items: Array, begin: Array) -> Array:
        """Items begin to begin + size of [total, ...]; zeros beyond the last."""
        padded = jnp.pad(items, [(0, self.size), *([(0, 0)] * (items.ndim - 1))])
        return lax.dynamic_slice_in_dim(padded, begin, self.size)
