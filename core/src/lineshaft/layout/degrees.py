"""How many ranks each mesh axis has, which rank sits where, and every rule that the degrees must meet."""

from __future__ import annotations

from dataclasses import dataclass

from lineshaft.errors import LayoutError
from lineshaft_contract.weights import Coordinate, coordinate_at

AXES = ("dp", "pp", "cp", "ep", "tp")
"""Mesh axes, outermost first: ranks are numbered row-major, so tp neighbours are adjacent."""

RUNNABLE = frozenset({"dp", "tp"})
"""Axes that this version runs; a degree above 1 on another axis is refused."""


@dataclass(frozen=True)
class ModelShape:
    """What the rules need to know of a model, in heads, values and vocabulary entries."""

    q_heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocab: int


@dataclass(frozen=True)
class Degrees:
    """The number of ranks along each axis."""

    dp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        return tuple((axis, getattr(self, axis)) for axis in AXES)

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.cp * self.ep * self.tp

    @property
    def replica(self) -> int:
        """The ranks of one dp replica, which are neighbours."""
        return self.world // self.dp

    def coordinate(self, rank: int) -> Coordinate:
        """The place of `rank` on every axis (row-major). Raises LayoutError outside [0, world)."""
        if not 0 <= rank < self.world:
            raise LayoutError(f"rank {rank} is outside 0..{self.world - 1}, the ranks of {self}")
        return coordinate_at(self.axes, rank)

    def validate(self, shape: ModelShape) -> None:
        """Raises LayoutError that lists every broken rule at once."""
        broken = [f"{axis}={n}: a degree is at least 1" for axis, n in self.axes if n < 1]
        later = [(axis, n) for axis, n in self.axes if n > 1 and axis not in RUNNABLE]
        broken += [f"{axis}={n}: this version runs dp and tp only, set {axis}=1" for axis, n in later]
        broken += self._broken_shares(shape) if self.tp > 0 else []
        if broken:
            raise LayoutError(f"layout {self} breaks {len(broken)} rule(s): " + "; ".join(broken))

    def _broken_shares(self, shape: ModelShape) -> list[str]:
        counts = {"query heads": shape.q_heads, "intermediate width": shape.intermediate}
        broken = [
            f"tp={self.tp} does not divide the {count} {what} (allowed: {_divisors(count)})"
            for what, count in counts.items()
            if count % self.tp
        ]
        if shape.kv_heads % self.tp and self.tp % shape.kv_heads:
            broken.append(f"neither of tp={self.tp} and {shape.kv_heads} kv heads divides the other")
        return broken

    def __str__(self) -> str:
        shown = [f"{axis}={n}" for axis, n in self.axes if n != 1]
        return " ".join(shown) or "tp=1"


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
