"""Llama, and the families that are Llama with one thing or another changed: Mistral, Qwen2, Qwen3 and Phi-3."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, checked_family, refuse_variants
from lineshaft.models.plain import plain
from lineshaft.models.reading import Config, count, flag, layer_windows, rope_table, window

UNQUANTIZED: Final[dict[str, Any]] = {"quantization_config": None}
UNBIASED: Final[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False, **UNQUANTIZED}
ROTATED: Final[dict[str, Any]] = {"partial_rotary_factor": 1.0}
"""Every value of a head is."""
QWEN: Final[dict[str, Any]] = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}


def _llama(config: Config, context: BuildContext) -> Decoder:
    refuse_variants(rope_table(config), ROTATED, "llama")
    bias = flag(config, "attention_bias")
    return plain(config, context, qkv_bias=bias, out_bias=bias, mlp_bias=flag(config, "mlp_bias"))


def _mistral(config: Config, context: BuildContext) -> Decoder:
    """A sliding window on every layer, where the config has one."""
    return plain(config, context, _one_window(config))


def _qwen2(config: Config, context: BuildContext) -> Decoder:
    """Biases of queries, keys and values."""
    return plain(config, context, _qwen_windows(config), qkv_bias=True)


def _qwen3(config: Config, context: BuildContext) -> Decoder:
    """Heads of queries and keys are normed before they are rotated."""
    bias = flag(config, "attention_bias")
    return plain(config, context, _qwen_windows(config), head_norm=True, qkv_bias=bias, out_bias=bias)


def _phi3(config: Config, context: BuildContext) -> Decoder:
    """Fused weights, a part of each head rotated, and LongRoPE; Phi-4-mini too."""
    return plain(config, context, _one_window(config), fused=True)


def _one_window(config: Config) -> list[int]:
    return [window(config)] * count(config, "num_hidden_layers")


def _qwen_windows(config: Config) -> list[int]:
    """The window of each layer: unless layer_types says otherwise, layers from max_window_layers on have one."""
    layers, first = count(config, "num_hidden_layers"), config.get("max_window_layers")
    first = first if isinstance(first, int) else layers
    return layer_windows(config, layers, lambda layer: layer >= first, flag(config, "use_sliding_window"))


LLAMA: Final = checked_family(
    "llama", ("LlamaForCausalLM", "llama"), _llama, {**ROTATED, **UNQUANTIZED, "sliding_window": None}, {}
)
MISTRAL: Final = checked_family(
    "mistral", ("MistralForCausalLM", "mistral"), _mistral, {**ROTATED, **UNBIASED, "layer_types": None},
    {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},  # null means no window
)  # fmt: skip
QWEN2: Final = checked_family(
    "qwen2", ("Qwen2ForCausalLM", "qwen2"), _qwen2, {**ROTATED, **UNQUANTIZED, "mlp_bias": False}, QWEN
)
QWEN3: Final = checked_family(
    "qwen3", ("Qwen3ForCausalLM", "qwen3"), _qwen3, {**ROTATED, **UNQUANTIZED, "mlp_bias": False},
    {**QWEN, "head_dim": 128},
)  # fmt: skip
PHI3: Final = checked_family(
    "phi3", ("Phi3ForCausalLM", "phi3"), _phi3, UNBIASED,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
)  # fmt: skip
