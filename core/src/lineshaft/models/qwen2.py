"""The Qwen2 family (and Qwen2.5): Llama with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, ModelFamily
from lineshaft.models.plain import plain
from lineshaft.models.reading import FULL, SLIDING, Config, count, flag, layer_types, refuse_variants, window

ONLY: Final[dict[str, Any]] = {"partial_rotary_factor": 1.0, "mlp_bias": False, "quantization_config": None}
ABSENT: Final[dict[str, Any]] = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}


def build(config: Config, context: BuildContext) -> Decoder:
    """Build a Qwen2 at a layout; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    refuse_variants(config, ONLY, "qwen2")
    config = {**ABSENT, **config}
    return plain(config, context, qwen_windows(config), qkv_bias=True)


def qwen_windows(config: Config) -> list[int]:
    """The window of each layer: unless layer_types says otherwise, layers from max_window_layers on have one."""
    layers = count(config, "num_hidden_layers")
    size = window(config) if flag(config, "use_sliding_window") else 0
    first = config.get("max_window_layers")
    first = first if isinstance(first, int) else layers
    kinds = layer_types(config, layers, [SLIDING if i >= first else FULL for i in range(layers)])
    return [size if kind == SLIDING else 0 for kind in kinds]


FAMILY = ModelFamily("qwen2", ("Qwen2ForCausalLM", "qwen2"), build)
