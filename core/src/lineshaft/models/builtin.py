"""The model families that core itself brings."""

from __future__ import annotations

from lineshaft.models import deepseek, gemma3, gpt_oss, llama, mixtral, qwen3_moe
from lineshaft.models.family import ModelFamily


def builtin_families() -> tuple[ModelFamily, ...]:
    """Every family of core; plugins add theirs through a hook."""
    dense = llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3, gemma3.FAMILY, llama.PHI3
    return (*dense, mixtral.FAMILY, qwen3_moe.FAMILY, gpt_oss.FAMILY, deepseek.FAMILY)
