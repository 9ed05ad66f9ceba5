"""The model families that core itself brings."""

from __future__ import annotations

from lineshaft.models.deepseek import FAMILY as DEEPSEEK
from lineshaft.models.family import ModelFamily
from lineshaft.models.gpt_oss import FAMILY as GPT_OSS
from lineshaft.models.llama import FAMILY as LLAMA
from lineshaft.models.mixtral import FAMILY as MIXTRAL
from lineshaft.models.qwen3_moe import FAMILY as QWEN3_MOE


def builtin_families() -> tuple[ModelFamily, ...]:
    """Every family of core; plugins add theirs through a hook."""
    return (LLAMA, MIXTRAL, QWEN3_MOE, GPT_OSS, DEEPSEEK)
