"""The Qwen2 family (and Qwen2.5): Llama with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.plain import plain
from lineshaft.models.reading import Config, count, flag, layer_windows

ONLY: Final[dict[str, Any]] = {"partial_rotary_factor": 1.0, "mlp_bias": False, "quantization_config": None}
ABSENT: Final[dict[str, Any]] = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}


def _build(config: Config, context: BuildContext) -> Decoder:
    return plain(config, context, qwen_windows(config), qkv_bias=True)


def qwen_windows(config: Config) -> list[int]:
    """The window of each layer: unless layer_types says otherwise, layers from max_window_layers on have one."""
    layers, first = count(config, "num_hidden_layers"), config.get("max_window_layers")
    first = first if isinstance(first, int) else layers
    return layer_windows(config, layers, lambda layer: layer >= first, flag(config, "use_sliding_window"))


FAMILY = checked_family("qwen2", ("Qwen2ForCausalLM", "qwen2"), _build, ONLY, ABSENT)
