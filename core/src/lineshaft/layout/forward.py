"""The communication a forward calls by name. A layout is chosen once; the forward has no `if`."""

from __future__ import annotations

from typing import Any

from lineshaft.layout.degrees import Degrees
from lineshaft_contract.weights import Array


class Layout:
    """One rank holds everything: every method hands its input on."""

    def enter(self, ops: Any, x: Array) -> Array:
        """Before a block's first product: what every rank must see whole. x [T, H]."""
        return x

    def leave(self, ops: Any, x: Array) -> Array:
        """After a block's last product: x [T, H] is a partial sum on each rank."""
        return x

    def moe_enter(self, ops: Any, x: Array) -> Array:
        return self.enter(ops, x)

    def moe_leave(self, ops: Any, x: Array) -> Array:
        return self.leave(ops, x)

    def logits(self, ops: Any, x: Array) -> Array:
        """x [R, V / tp] -> [R, V]."""
        return x

    def attend(self, ops: Any, q: Array, cache: Any, step: Any, use: str = "attend", **arrays: Array) -> Array:
        """q [T, Hq, D] -> [T, Hq, Dv] on this rank's heads; `use` is the declared name, `arrays` the op's optional
        ones."""
        return getattr(ops, use)(q, cache, step, **arrays)

    def experts(
        self, ops: Any, x: Array, ids: Array, probs: Array, w13: Any, w2: Any, expert_map: Array, **biases: Array
    ) -> Array:
        """x [T, H] -> partial sum [T, H] over this rank's experts, or over its part of each expert's width."""
        return ops.expert_mlp(x, ids, probs, w13, w2, expert_map, **biases)


class TensorParallel(Layout):
    """Heads and widths are split over the tp axis (Megatron-LM): one all_reduce after each block."""

    def leave(self, ops: Any, x: Array) -> Array:
        return ops.all_reduce(x, "tp")

    def logits(self, ops: Any, x: Array) -> Array:
        return ops.all_gather(x, "tp", 1)


def choose_layout(degrees: Degrees) -> Layout:
    """The layout for these degrees; axes of size 1 disappear here."""
    return TensorParallel() if degrees.tp > 1 else Layout()
