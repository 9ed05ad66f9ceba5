"""Every op of the contract, one `OpSpec` each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from lineshaft_contract.ops import (
    attention,
    cache,
    collectives,
    experts,
    linear,
    logits,
    norm,
    pointwise,
    rope,
    rope_write,
    rows,
)
from lineshaft_contract.ops.spec import Case, Numerics, OpSpec, Tolerance


def all_ops(further: Iterable[OpSpec] = ()) -> Mapping[str, OpSpec]:
    """All ops by name, in the order of a forward: rows, products, cache, attention, experts, logits, collectives; then
    `further` ones, which plugins bring."""
    themes = (rows, linear, pointwise, norm, rope, cache, rope_write, attention, experts, logits, collectives)
    own = (spec for theme in themes for spec in theme.specs())
    return MappingProxyType({spec.name: spec for spec in (*own, *further)})


__all__ = ["Case", "Numerics", "OpSpec", "Tolerance", "all_ops"]
