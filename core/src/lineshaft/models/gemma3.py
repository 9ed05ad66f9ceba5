"""The text models of Gemma 3: layers of a short window between full ones, norms on both sides of every block."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from lineshaft.models import reading
from lineshaft.models.attention import Attention, Rope
from lineshaft.models.decoder import Decoder, Layer, Norms
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.plain import attentions
from lineshaft.models.reading import FULL, SLIDING, Config, Sizes
from lineshaft_contract.ops.spec import numpy_dtype

ONLY: Final[dict[str, Any]] = {
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
ABSENT: Final[dict[str, Any]] = {
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "tie_word_embeddings": True,
}  # fmt: skip
NORMS: Final = Norms(
    mlp_norm="pre_feedforward_layernorm",
    after_attend="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
STORED_LESS: Final = 1.0
"""Checkpoints hold the weights of norms less this."""


def _build(config: Config, context: BuildContext) -> Decoder:
    sizes = Sizes.read(config)
    shape, norm = sizes.shape, RmsNorm(context, sizes.shape.hidden, sizes.eps, STORED_LESS)
    mlp = GatedMlp(
        context=context, hidden=shape.hidden, width=shape.intermediate,
        activation=reading.activation(config, "hidden_activation"),
    )  # fmt: skip
    layers = [Layer(attention, mlp, norm, NORMS) for attention in _attentions(config, context, sizes)]
    scale = np.float32(shape.hidden**0.5).astype(numpy_dtype(context.dtype))  # rounded as the model was trained with
    return Decoder(context, sizes, layers, norm, embed_scale=float(scale))


def _attentions(config: Config, context: BuildContext, sizes: Sizes) -> list[Attention]:
    every, bias = reading.count(config, "sliding_window_pattern"), reading.flag(config, "attention_bias")
    windows = reading.layer_windows(config, sizes.layers, lambda layer: (layer + 1) % every != 0)
    return attentions(
        context, sizes, windows, reading.rope(config, context, FULL, 1e6), _local_rope(config, context),
        scale=reading.number(config, "query_pre_attn_scalar") ** -0.5, qkv_bias=bias, out_bias=bias,
        head_norm=RmsNorm(context, sizes.head_dim, sizes.eps, STORED_LESS),
    )  # fmt: skip


def _local_rope(config: Config, context: BuildContext) -> Rope:
    """Of layers with a window: never scaled, unless the config has a table of their own."""
    if SLIDING in reading.rope_table(config):
        return reading.rope(config, context, SLIDING)
    return Rope(reading.number(config, "rope_local_base_freq", 10000.0))


FAMILY = checked_family("gemma3", ("Gemma3ForCausalLM", "gemma3_text"), _build, ONLY, ABSENT)
