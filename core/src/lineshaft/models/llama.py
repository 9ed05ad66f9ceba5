"""The Llama family: Llama 2 and 3, SmolLM2 and whatever shares their config."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, checked_family, refuse_variants
from lineshaft.models.plain import plain
from lineshaft.models.reading import Config, flag, rope_table

ONLY: Final[dict[str, Any]] = {"partial_rotary_factor": 1.0, "sliding_window": None, "quantization_config": None}


def _build(config: Config, context: BuildContext) -> Decoder:
    refuse_variants(rope_table(config), ONLY, "llama")
    bias = flag(config, "attention_bias")
    return plain(config, context, qkv_bias=bias, out_bias=bias, mlp_bias=flag(config, "mlp_bias"))


FAMILY = checked_family("llama", ("LlamaForCausalLM", "llama"), _build, ONLY, {})
