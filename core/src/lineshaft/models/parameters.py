"""Parameters that blocks of any family declare: linear weights, biases, norms; and how a block applies them.

Knows shapes and problems, and no family.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, Final

from lineshaft.errors import InvalidValue
from lineshaft.models import shards
from lineshaft.models.family import STORED, BuildContext
from lineshaft_contract.ops.quantize import INT4
from lineshaft_contract.problems import ConstProblem, LinearProblem, NormProblem
from lineshaft_contract.sessions import Tree
from lineshaft_contract.weights import Array, Param

SMALLEST_GROUP: Final = 32
LARGEST_GROUP: Final = 128
"""Columns that share a scale in codes of 4 bits: a power of two, the largest of these that divides a rank's."""


def linear(context: BuildContext, name: str, n: int, k: int, shard: shards.Shard, *, bias: bool = False) -> Param:
    """The weight [n, k] of a product on this rank, quantized as the context says; `bias`: it is used with one.

    Raises InvalidValue where groups of columns with one scale do not divide k.
    """
    scheme, group_size = context.quantization if context.quantization != STORED else context.stored_scheme(shard), 0
    if scheme == INT4:
        group_size = gcd(k, LARGEST_GROUP)
        if group_size < SMALLEST_GROUP:
            raise InvalidValue(
                f"quantization = {scheme!r}: weight {name} has {k} columns on a rank, cut into no groups of a power of "
                f"two from {SMALLEST_GROUP} to {LARGEST_GROUP}; use another quantization, or another layout.tp"
            )
    problem = LinearProblem(dtype=context.dtype, n=n, k=k, scheme=scheme, group_size=group_size, bias=bias)
    return Param(name, name, (n, k), context.dtype, {"linear": problem}, shard, varies=("tp",))


def const(context: BuildContext, name: str, shape: tuple[int, ...], shard: shards.Shard, dtype: str = "") -> Param:
    """Numbers of this rank that a forward hands to an op as an array: a bias, attention sinks. In the executed dtype
    where none is given."""
    dtype = dtype or context.dtype
    problem = ConstProblem(dtype=dtype, shape=shape)
    return Param(name, name, shape, dtype, {"const": problem}, shard, varies=("tp",))


def product(ops: Any, w: Tree, name: str, x: Array) -> Array:
    """x [T, k] times the weight `name` [n, k], plus its bias `<name>_bias` where the block has one -> [T, n]."""
    bias = w.get(f"{name}_bias")
    return ops.linear(x, w[name]) if bias is None else ops.linear(x, w[name], bias=bias)


@dataclass(frozen=True)
class RmsNorm:
    """RMS norms of `width` values; a checkpoint that stores w - `offset` (Gemma) gets it added in float32."""

    context: BuildContext
    width: int
    eps: float
    offset: float = 0.0

    def param(self, name: str, source: str) -> Param:
        dtype, shape = self.context.dtype, (self.width,)
        problem = NormProblem(dtype=dtype, width=self.width, eps=self.eps)
        shard = shards.shifted(source, shape, self.offset) if self.offset else shards.whole(source, shape)
        return Param(name, name, shape, dtype, {"norm": problem}, shard)
