"""The gated MLP block of decoders. Knows no family."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from lineshaft.models import shards
from lineshaft.models.family import BuildContext, Uses
from lineshaft.models.parameters import const, linear, product
from lineshaft_contract.sessions import Tree
from lineshaft_contract.weights import Array

ACTIVATIONS: Final = MappingProxyType({"silu": "silu_mul", "gelu_pytorch_tanh": "gelu_mul"})
"""A config's word for the activation of the gate -> the op."""


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """down(activation(gate x) * up x) at one layout: `width` is the whole model's.

    at: the block's prefix in the checkpoint, after the layer's; fused: the checkpoint holds one gate_up_proj.
    """

    context: BuildContext
    hidden: int
    width: int
    activation: str = "silu"
    at: str = "mlp."
    bias: bool = False
    fused: bool = False

    def __call__(self, ops: Any, w: Tree, x: Array) -> Array:
        """x [T, H] -> [T, H]."""
        return self.context.layout.leave(ops, self.partial(ops, w, self.context.layout.enter(ops, x)))

    def partial(self, ops: Any, w: Tree, x: Array) -> Array:
        """x [T, H], which has entered the layout -> [T, H] before it leaves it: this rank's part of the sum."""
        gated = getattr(ops, ACTIVATIONS[self.activation])(product(ops, w, "gate_up", x))
        return product(ops, w, "down", gated)

    def uses(self) -> Uses:
        return {}

    def params(self, source: str, name: str) -> Tree:
        """The block's parameters: `source` is the layer's prefix in the checkpoint, `name` the one of its weights."""
        at, hidden, tp = source + self.at, self.hidden, self.context.degrees.tp
        share, where = self.width // tp, shards.even(self.width, tp)
        down = shards.cols(at + "down_proj.weight", (hidden, self.width), where)
        both = self._gate_up(at, "weight", (hidden,), where)
        found = {
            "gate_up": linear(self.context, name + "gate_up", 2 * share, hidden, both, bias=self.bias),
            "down": linear(self.context, name + "down", hidden, share, down, bias=self.bias),
        }
        if self.bias:
            both, down = self._gate_up(at, "bias", (), where), shards.on_first(at + "down_proj.bias", (hidden,))
            found["gate_up_bias"] = const(self.context, name + "gate_up_bias", (2 * share,), both)
            found["down_bias"] = const(self.context, name + "down_bias", (hidden,), down)
        return found

    def _gate_up(self, at: str, kind: str, tail: tuple[int, ...], where: shards.Range) -> shards.Shard:
        """Rows of gate and up for a rank: each cut first and joined after."""
        parts = [(f"{at}{part}_proj.{kind}", self.width, where) for part in ("gate", "up")]
        return shards.stacked(parts, tail, f"{at}gate_up_proj.{kind}" if self.fused else "")
