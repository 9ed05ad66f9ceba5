"""The DeepSeek-V2 family: latent attention, dense layers first, then routed experts beside shared ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from lineshaft.errors import UnknownArchitecture
from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.experts import ExpertMlp
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.latent import LatentAttention
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.reading import Config, Sizes, count, number, rope, rope_table, some, yarn_scale
from lineshaft_contract.problems import RouterProblem

ONLY: Final[dict[str, Any]] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "norm_topk_prob": False, "moe_layer_freq": 1,
    "scoring_func": "softmax", "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
ABSENT: Final[dict[str, Any]] = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_shared_experts": 2, "topk_method": "greedy",
}  # fmt: skip


def _build(config: Config, context: BuildContext) -> Decoder:
    sizes = Sizes.read(config)
    sizes = replace(sizes, shape=replace(sizes.shape, kv_heads=1))  # of latents, whatever the config says
    attention = _attention(config, context, sizes)
    dense = GatedMlp(context=context, hidden=sizes.shape.hidden, width=sizes.shape.intermediate)
    experts, first = _experts(config, context, sizes.shape.hidden), some(config, "first_k_dense_replace")
    norm = RmsNorm(context, sizes.shape.hidden, sizes.eps)
    layers = [Layer(attention, dense if layer < first else experts, norm) for layer in range(sizes.layers)]
    return Decoder(context, sizes, layers, norm)


def _attention(config: Config, context: BuildContext, sizes: Sizes) -> LatentAttention:
    nope, rotated = count(config, "qk_nope_head_dim"), count(config, "qk_rope_head_dim")
    scale, table = (nope + rotated) ** -0.5, rope_table(config)
    if table.get("factor") and table.get("mscale_all_dim"):
        scale *= yarn_scale(number(table, "factor"), number(table, "mscale_all_dim")) ** 2
    return LatentAttention(
        context=context, hidden=sizes.shape.hidden, heads=sizes.shape.q_heads, q_rank=some(config, "q_lora_rank"),
        rank=count(config, "kv_lora_rank"), nope_dim=nope, rope_dim=rotated,
        v_dim=count(config, "v_head_dim"), rope=replace(rope(config, context), interleaved=True),
        max_position=sizes.max_position, scale=scale,
    )  # fmt: skip


def _experts(config: Config, context: BuildContext, hidden: int) -> ExpertMlp:
    method, width, shared = config.get("topk_method"), count(config, "moe_intermediate_size"), None
    if method not in (None, "greedy", "group_limited_greedy"):
        raise UnknownArchitecture(
            f"config.json: topk_method is {method!r:.80}; the deepseek_v2 family has greedy and group_limited_greedy"
        )
    limited = method == "group_limited_greedy"
    router = RouterProblem(
        dtype=context.dtype, experts=count(config, "n_routed_experts"), k=count(config, "num_experts_per_tok"),
        scale=number(config, "routed_scaling_factor", 1.0), groups=count(config, "n_group") if limited else 0,
        group_top=count(config, "topk_group") if limited else 1,
    )  # fmt: skip
    if always := some(config, "n_shared_experts"):
        shared = GatedMlp(context=context, hidden=hidden, width=always * width, at="mlp.shared_experts.")
    return ExpertMlp(context=context, hidden=hidden, width=width, router=router, shared=shared)


FAMILY = checked_family("deepseek_v2", ("DeepseekV2ForCausalLM", "deepseek_v2"), _build, ONLY, ABSENT)
