"""The communication a forward calls by name. A layout is chosen once; the forward has no `if`."""

from __future__ import annotations

from typing import Any

from lineshaft_contract.weights import Array


class Layout:
    """One rank holds everything: every method hands its input on."""

    def enter(self, ops: Any, x: Array) -> Array:
        """Before a block's first product: what every rank must see whole. x [T, H]."""
        return x

    def leave(self, ops: Any, x: Array) -> Array:
        """After a block's last product: x [T, H] is a partial sum on each rank."""
        return x

    def logits(self, ops: Any, x: Array) -> Array:
        """x [R, V / tp] -> [R, V]."""
        return x

    def attend(self, ops: Any, q: Array, cache: Any, step: Any, use: str = "attend", **arrays: Array) -> Array:
        """q [T, Hq, D] -> [T, Hq, Dv] on this rank's heads; `use` is the declared name, `arrays` the op's optional
        ones."""
        return getattr(ops, use)(q, cache, step, **arrays)


class TensorParallel(Layout):
    """Heads and widths are split over the tp axis (Megatron-LM): one all_reduce after each block."""

    def leave(self, ops: Any, x: Array) -> Array:
        return ops.all_reduce(x, "tp")

    def logits(self, ops: Any, x: Array) -> Array:
        return ops.all_gather(x, "tp", 1)
