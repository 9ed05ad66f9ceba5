"""A family that core does not have: SmolLM3, a Llama that leaves the positions out of every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lineshaft.models import BuildContext, ModelFamily, checked_family
from lineshaft.models.attention import Attention
from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.reading import Sizes, count, rope
from lineshaft_contract.errors import CorruptCheckpoint
from lineshaft_contract.hooks import hookimpl

ABSENT: dict[str, Any] = {  # what a config.json without the key means
    "max_position_embeddings": 32768, "no_rope_layer_interval": 4, "tie_word_embeddings": True,
}  # fmt: skip
ONLY: dict[str, Any] = {  # what changes the result, with the one value that is computed here
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "quantization_config": None,
}  # fmt: skip


def build(config: Mapping[str, Any], context: BuildContext) -> Decoder:
    """The model at a layout. Raises LayoutError, CorruptCheckpoint, UnknownArchitecture."""
    sizes = Sizes.read(config)
    norm = RmsNorm(context, sizes.shape.hidden, sizes.eps)
    mlp = GatedMlp(context=context, hidden=sizes.shape.hidden, width=sizes.shape.intermediate)
    embedding = rope(config, context, base=2e6)
    layers = []
    for rotated in rotated_layers(config, sizes.layers):
        attention = Attention(
            context=context, shape=sizes.shape, head_dim=sizes.head_dim, max_position=sizes.max_position,
            rope=embedding if rotated else None,
        )  # fmt: skip
        layers.append(Layer(attention, mlp, norm))
    return Decoder(context, sizes, layers, norm)


def rotated_layers(config: Mapping[str, Any], layers: int) -> Sequence[int]:
    """1 for each layer with a rotary embedding, 0 for one without."""
    given = config.get("no_rope_layers")
    if given is None:
        every = count(config, "no_rope_layer_interval")
        return [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not all(each in (0, 1) for each in given):
        raise CorruptCheckpoint(f"config.json: no_rope_layers is {given!r:.80}, it must have 0 or 1 for each layer")
    return given[:layers]


@hookimpl
def lineshaft_models() -> list[ModelFamily]:
    return [checked_family("smollm3", ("SmolLM3ForCausalLM", "smollm3"), build, ONLY, ABSENT)]
