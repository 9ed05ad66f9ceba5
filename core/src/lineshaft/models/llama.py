"""The Llama family: Llama 2 and 3, SmolLM2 and whatever shares their config."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.attention import Attention
from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.family import BuildContext, ModelFamily
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.reading import Config, Sizes, refuse_variants, rope, rope_table

ONLY: Final[dict[str, Any]] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
    "sliding_window": None, "quantization_config": None,
}  # fmt: skip
"""Keys that change what is computed, with the one value that this family computes."""


def build(config: Config, context: BuildContext) -> Decoder:
    """Build a Llama at a layout; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    refuse_variants(config, ONLY, "llama")
    refuse_variants(rope_table(config), ONLY, "llama")
    sizes = Sizes.read(config)
    norm = RmsNorm(context, sizes.shape.hidden, sizes.eps)
    attention = Attention(
        context=context, shape=sizes.shape, head_dim=sizes.head_dim, max_position=sizes.max_position,
        rope=rope(config, context),
    )  # fmt: skip
    mlp = GatedMlp(context=context, hidden=sizes.shape.hidden, width=sizes.shape.intermediate)
    return Decoder(context, sizes, [Layer(attention, mlp, norm)] * sizes.layers, norm)


FAMILY = ModelFamily("llama", ("LlamaForCausalLM", "llama"), build)
