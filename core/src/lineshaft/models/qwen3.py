"""The Qwen3 family, dense: Llama whose heads of queries and keys are normed before they are rotated."""

from __future__ import annotations

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.plain import plain
from lineshaft.models.qwen2 import ABSENT, ONLY, qwen_windows
from lineshaft.models.reading import Config, flag


def _build(config: Config, context: BuildContext) -> Decoder:
    bias = flag(config, "attention_bias")
    return plain(config, context, qwen_windows(config), head_norm=True, qkv_bias=bias, out_bias=bias)


FAMILY = checked_family("qwen3", ("Qwen3ForCausalLM", "qwen3"), _build, ONLY, {**ABSENT, "head_dim": 128})
