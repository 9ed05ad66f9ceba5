"""The Phi-3 family (and Phi-4-mini): Llama with fused weights, a part of each head rotated, and LongRoPE."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.plain import plain
from lineshaft.models.reading import Config, count, window

ONLY: Final[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False, "quantization_config": None}
ABSENT: Final[dict[str, Any]] = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
}  # fmt: skip


def _build(config: Config, context: BuildContext) -> Decoder:
    return plain(config, context, [window(config)] * count(config, "num_hidden_layers"), fused=True)


FAMILY = checked_family("phi3", ("Phi3ForCausalLM", "phi3"), _build, ONLY, ABSENT)
