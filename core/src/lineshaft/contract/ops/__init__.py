"""Every op of the contract, one `OpSpec` each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lineshaft.contract.ops import attention, cache, collectives, experts, linear, logits, norm, pointwise, rope, rows
from lineshaft.contract.ops.spec import Case, Numerics, OpSpec, Tolerance


def all_ops() -> Mapping[str, OpSpec]:
    """All ops by name, in the order of a forward: rows, products, cache, attention, experts, logits, collectives."""
    themes = (rows, linear, pointwise, norm, rope, cache, attention, experts, logits, collectives)
    return MappingProxyType({spec.name: spec for theme in themes for spec in theme.specs()})


__all__ = ["Case", "Numerics", "OpSpec", "Tolerance", "all_ops"]
