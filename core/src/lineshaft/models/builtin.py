"""The model families that core itself brings."""

from __future__ import annotations

from lineshaft.models import gemma3, llama, mistral, phi3, qwen2, qwen3
from lineshaft.models.family import ModelFamily


def builtin_families() -> tuple[ModelFamily, ...]:
    """Every family of core; plugins add theirs through a hook."""
    return tuple(module.FAMILY for module in (llama, mistral, qwen2, qwen3, gemma3, phi3))
