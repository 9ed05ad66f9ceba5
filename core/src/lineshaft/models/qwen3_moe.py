"""The Qwen3-MoE family: normed heads of queries and keys, and experts in all layers but those that the config names."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder, Layer, MlpBlock
from lineshaft.models.experts import ExpertMlp
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.plain import attentions
from lineshaft.models.reading import Config, Sizes, count, flag, rope, value, window
from lineshaft_contract.problems import RouterProblem

ONLY: Final[dict[str, Any]] = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None}
ABSENT: Final[dict[str, Any]] = {
    "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096, "decoder_sparse_step": 1,
    "moe_intermediate_size": 768, "num_experts_per_tok": 8,
}  # fmt: skip


def _build(config: Config, context: BuildContext) -> Decoder:
    sizes = Sizes.read(config)
    hidden, bias = sizes.shape.hidden, flag(config, "attention_bias")
    size = window(config) if flag(config, "use_sliding_window") else 0
    found = attentions(
        context, sizes, [size] * sizes.layers, rope(config, context), qkv_bias=bias, out_bias=bias,
        head_norm=RmsNorm(context, sizes.head_dim, sizes.eps),
    )  # fmt: skip
    router = RouterProblem(
        dtype=context.dtype, experts=count(config, "num_experts", config.get("num_local_experts")),
        k=count(config, "num_experts_per_tok"), renormalise=flag(config, "norm_topk_prob"),
    )  # fmt: skip
    experts = ExpertMlp(context=context, hidden=hidden, width=count(config, "moe_intermediate_size"), router=router)
    dense = GatedMlp(context=context, hidden=hidden, width=sizes.shape.intermediate)
    norm = RmsNorm(context, hidden, sizes.eps)
    blocks: list[MlpBlock] = [dense if plain else experts for plain in _dense_layers(config, sizes.layers)]
    return Decoder(context, sizes, [Layer(*pair, norm) for pair in zip(found, blocks, strict=True)], norm)


def _dense_layers(config: Config, layers: int) -> list[bool]:
    """Which layers have no experts: those that `mlp_only_layers` names, and all but each `decoder_sparse_step`th."""

    def valid(given: object) -> bool:
        return isinstance(given, list | tuple) and all(isinstance(layer, int) for layer in given)

    named = value(config, "mlp_only_layers", [], valid, "a list of layer numbers")
    step = count(config, "decoder_sparse_step")
    return [layer in named or (layer + 1) % step != 0 for layer in range(layers)]


FAMILY = checked_family("qwen3_moe", ("Qwen3MoeForCausalLM", "qwen3_moe"), _build, ONLY, ABSENT)
