"""The model families that core itself brings."""

from __future__ import annotations

from lineshaft.models.family import ModelFamily
from lineshaft.models.llama import FAMILY as LLAMA


def builtin_families() -> tuple[ModelFamily, ...]:
    """Every family of core; plugins add theirs through a hook."""
    return (LLAMA,)
