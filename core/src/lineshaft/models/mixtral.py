"""The Mixtral family: grouped-query attention and, in every layer, experts."""

from __future__ import annotations

from typing import Any, Final

from lineshaft.contract.problems import RouterProblem
from lineshaft.models.attention import Attention
from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.experts import ExpertMlp, Matrices
from lineshaft.models.family import BuildContext, ModelFamily
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.reading import Config, Sizes, count, refuse_variants, rope, window

ONLY: Final[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "quantization_config": None}
"""Keys that change what is computed, with the one value that this family computes."""


def build(config: Config, context: BuildContext) -> Decoder:
    """Build a Mixtral at a layout; raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    refuse_variants(config, ONLY, "mixtral")
    sizes = Sizes.read(config)
    hidden = sizes.shape.hidden
    attention = Attention(
        context=context, shape=sizes.shape, head_dim=sizes.head_dim, max_position=sizes.max_position,
        rope=rope(config, context, base=1e6), window=window(config),
    )  # fmt: skip
    router = RouterProblem(
        dtype=context.dtype, experts=count(config, "num_local_experts", 8), k=count(config, "num_experts_per_tok", 2),
        renormalise=True,
    )  # fmt: skip
    experts = ExpertMlp(
        context=context, hidden=hidden, width=sizes.shape.intermediate, router=router, at="block_sparse_moe.",
        stored=Matrices("w1", "w3", "w2"),
    )  # fmt: skip
    norm = RmsNorm(context, hidden, sizes.eps)
    return Decoder(context, sizes, [Layer(attention, experts, norm)] * sizes.layers, norm)


FAMILY = ModelFamily("mixtral", ("MixtralForCausalLM", "mixtral"), build)
