"""Parameters that blocks of any family declare: linear weights, biases, norms; and how a block applies them.

Knows shapes and problems, and no family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lineshaft.models import shards
from lineshaft.models.family import BuildContext
from lineshaft_contract.problems import ConstProblem, LinearProblem, NormProblem
from lineshaft_contract.sessions import Tree
from lineshaft_contract.weights import Array, Param


def linear(context: BuildContext, name: str, n: int, k: int, shard: shards.Shard, *, bias: bool = False) -> Param:
    """The weight [n, k] of a product on this rank, quantized as the context says; `bias`: it is used with one."""
    problem = LinearProblem(dtype=context.dtype, n=n, k=k, scheme=context.quantization, bias=bias)
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
