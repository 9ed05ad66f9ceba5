"""The model families that core itself brings."""

from __future__ import annotations

from lineshaft.models import deepseek, gemma3, gpt_oss, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe
from lineshaft.models.family import ModelFamily


def builtin_families() -> tuple[ModelFamily, ...]:
    """Every family of core; plugins add theirs through a hook."""
    files = (llama, mistral, qwen2, qwen3, gemma3, phi3, mixtral, qwen3_moe, gpt_oss, deepseek)
    return tuple(file.FAMILY for file in files)
