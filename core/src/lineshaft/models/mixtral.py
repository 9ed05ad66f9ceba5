"""The Mixtral family: grouped-query attention and, in every layer, experts."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.experts import ExpertMlp, Matrices
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.plain import attentions
from lineshaft.models.reading import Config, Sizes, count, rope, window
from lineshaft_contract.problems import RouterProblem

ONLY: Final[dict[str, Any]] = {
    "hidden_act": "silu", "attention_bias": False, "partial_rotary_factor": 1.0, "quantization_config": None,
}  # fmt: skip
ABSENT: Final[dict[str, Any]] = {
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip


def _build(config: Config, context: BuildContext) -> Decoder:
    sizes = Sizes.read(config)
    hidden = sizes.shape.hidden
    router = RouterProblem(
        dtype=context.dtype, experts=count(config, "num_local_experts"), k=count(config, "num_experts_per_tok"),
        renormalise=True,
    )  # fmt: skip
    experts = ExpertMlp(
        context=context, hidden=hidden, width=sizes.shape.intermediate, router=router, at="block_sparse_moe.",
        stored=Matrices("w1", "w3", "w2"),
    )  # fmt: skip
    norm = RmsNorm(context, hidden, sizes.eps)
    found = attentions(context, sizes, [window(config)] * sizes.layers, rope(config, context, base=1e6))
    return Decoder(context, sizes, [Layer(attention, experts, norm) for attention in found], norm)


FAMILY = checked_family("mixtral", ("MixtralForCausalLM", "mixtral"), _build, ONLY, ABSENT)
