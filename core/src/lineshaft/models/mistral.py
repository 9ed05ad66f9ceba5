"""The Mistral family: Llama with a sliding window on every layer, where the config has one."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.plain import plain
from lineshaft.models.reading import Config, count, window

ONLY: Final[dict[str, Any]] = {
    "partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False, "layer_types": None,
    "quantization_config": None,
}  # fmt: skip
ABSENT: Final[dict[str, Any]] = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
"""What a config without the key means; one that is null means none."""


def _build(config: Config, context: BuildContext) -> Decoder:
    return plain(config, context, [window(config)] * count(config, "num_hidden_layers"))


FAMILY = checked_family("mistral", ("MistralForCausalLM", "mistral"), _build, ONLY, ABSENT)
