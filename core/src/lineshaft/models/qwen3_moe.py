"""The Qwen3-MoE family: normed heads of queries and keys, and experts in all layers but those that the config names."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.contract.problems import RouterProblem
from lineshaft.errors import CorruptCheckpoint
from lineshaft.models.attention import Attention
from lineshaft.models.decoder import Decoder, Layer, MlpBlock
from lineshaft.models.experts import ExpertMlp
from lineshaft.models.family import BuildContext, ModelFamily
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.reading import Config, Sizes, count, flag, refuse_variants, rope, window

ONLY: Final[dict[str, Any]] = {"hidden_act": "silu", "quantization_config": None}
"""Keys that change what is computed, with the one value that this family computes."""


def build(config: Config, context: BuildContext) -> Decoder:
    """Build a Qwen3-MoE at a layout; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    refuse_variants(config, ONLY, "qwen3_moe")
    sizes = Sizes.read(config)
    hidden, bias = sizes.shape.hidden, flag(config, "attention_bias")
    attention = Attention(
        context=context, shape=sizes.shape, head_dim=sizes.head_dim, max_position=sizes.max_position,
        rope=rope(config, context), window=window(config) if flag(config, "use_sliding_window") else 0,
        qkv_bias=bias, out_bias=bias, head_norm=RmsNorm(context, sizes.head_dim, sizes.eps),
    )  # fmt: skip
    router = RouterProblem(
        dtype=context.dtype, experts=count(config, "num_experts", config.get("num_local_experts")),
        k=count(config, "num_experts_per_tok"), renormalise=flag(config, "norm_topk_prob"),
    )  # fmt: skip
    experts = ExpertMlp(context=context, hidden=hidden, width=count(config, "moe_intermediate_size"), router=router)
    dense = GatedMlp(context=context, hidden=hidden, width=sizes.shape.intermediate)
    norm = RmsNorm(context, hidden, sizes.eps)
    blocks: list[MlpBlock] = [dense if plain else experts for plain in _dense_layers(config, sizes.layers)]
    return Decoder(context, sizes, [Layer(attention, mlp, norm) for mlp in blocks], norm)


def _dense_layers(config: Config, layers: int) -> list[bool]:
    """Which layers have no experts: those that `mlp_only_layers` names, and all but each `decoder_sparse_step`th."""
    named, step = config.get("mlp_only_layers") or [], count(config, "decoder_sparse_step", 1)
    if not isinstance(named, (list, tuple)) or not all(isinstance(layer, int) for layer in named):
        raise CorruptCheckpoint(f"config.json: mlp_only_layers is {named!r:.80}, it must be a list of layer numbers")
    return [layer in named or (layer + 1) % step != 0 for layer in range(layers)]


FAMILY = ModelFamily("qwen3_moe", ("Qwen3MoeForCausalLM", "qwen3_moe"), build)
