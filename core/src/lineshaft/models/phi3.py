"""The Phi-3 family (and Phi-4-mini): Llama with fused weights, a part of each head rotated, and LongRoPE."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder
from lineshaft.models.family import BuildContext, ModelFamily
from lineshaft.models.plain import plain
from lineshaft.models.reading import Config, count, refuse_variants, window

ONLY: Final[dict[str, Any]] = {"attention_bias": False, "mlp_bias": False, "quantization_config": None}
ABSENT: Final[dict[str, Any]] = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
}  # fmt: skip


def build(config: Config, context: BuildContext) -> Decoder:
    """Build a Phi-3 at a layout; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    refuse_variants(config, ONLY, "phi3")
    config = {**ABSENT, **config}
    return plain(config, context, [window(config)] * count(config, "num_hidden_layers"), fused=True)


FAMILY = ModelFamily("phi3", ("Phi3ForCausalLM", "phi3"), build)
