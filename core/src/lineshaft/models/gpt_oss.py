"""The gpt-oss family: attention with sinks, in every second layer over a window, and experts with biases.

Owns how its checkpoints store experts: one tensor for all, plain or in MXFP4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np

from lineshaft.errors import UnknownArchitecture
from lineshaft.models import shards
from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.experts import ExpertMlp
from lineshaft.models.experts import Sizes as ExpertSizes
from lineshaft.models.family import BuildContext, checked_family
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.plain import attentions
from lineshaft.models.reading import Config, Sizes, count, flag, layer_windows, number, rope
from lineshaft.models.shards import Numbers
from lineshaft_contract.problems import RouterProblem
from lineshaft_contract.weights import Coordinate

ONLY: Final[dict[str, Any]] = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
ABSENT: Final[dict[str, Any]] = {
    "head_dim": 64, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "sliding_window": 128, "attention_bias": True, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
}  # fmt: skip

FP4: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The numbers of MXFP4's codes of four bits (OCP Microscaling Formats, 1.0)."""

Cut = Callable[[Numbers, Coordinate], list[Numbers]]


@dataclass(frozen=True)
class FusedExperts:
    """`gate_up_proj`, in which the rows of gate and of up take turns, and `down_proj`, each one tensor for all experts:
    plain, in the order [in, out], or in MXFP4, [out, in] as blocks of 32 numbers with a scale each."""

    mxfp4: bool = False

    def w13(self, at: str, sizes: ExpertSizes, where: shards.Range) -> shards.Shard:
        experts, hidden, width = sizes

        def cut(matrix: Numbers, place: Coordinate) -> list[Numbers]:
            return [rows[slice(*where(place))] for rows in (matrix[0::2], matrix[1::2])]

        return self._each(at + "experts.gate_up_proj", (experts, 2 * width, hidden), cut)

    def w2(self, at: str, sizes: ExpertSizes, where: shards.Range) -> shards.Shard:
        return self._each(at + "experts.down_proj", sizes, lambda matrix, place: [matrix[:, slice(*where(place))]])

    def _each(self, name: str, shape: tuple[int, int, int], cut: Cut) -> shards.Shard:
        """`cut` of each expert's matrix [out, in]; `shape` is (experts, out, in)."""
        experts, n, k = shape
        if not self.mxfp4:
            plain = name, (experts, k, n)
            return shards.made(lambda place, data: [part for one in data for part in cut(one.T, place)], plain)

        def decoded(place: Coordinate, blocks: Numbers, scales: Numbers) -> list[Numbers]:
            return [part for one in zip(blocks, scales, strict=True) for part in cut(decode_mxfp4(*one), place)]

        packed = (experts, n, k // 32)
        return shards.made(decoded, (name + "_blocks", (*packed, 16)), (name + "_scales", packed))

    def biases(self, at: str, sizes: ExpertSizes, where: shards.Range) -> tuple[shards.Shard, shards.Shard]:
        experts, hidden, width = sizes

        def first(place: Coordinate, data: Numbers) -> list[Numbers]:
            start, stop = where(place)
            return [np.concatenate([data[:, 0::2][:, start:stop], data[:, 1::2][:, start:stop]], 1)]

        second = shards.on_first(at + "experts.down_proj_bias", (experts, hidden))
        return shards.made(first, (at + "experts.gate_up_proj_bias", (experts, 2 * width))), second


def decode_mxfp4(blocks: Numbers, scales: Numbers) -> Numbers:
    """blocks uint8[n, k / 32, 16] of two codes each, the lower one first, scales uint8[n, k / 32] of powers of two ->
    bfloat16[n, k], which holds every product exactly."""
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scales.shape, 32)
    numbers = np.ldexp(FP4[codes], scales.astype(np.int32)[..., None] - 127)
    return numbers.reshape(len(scales), -1).astype(ml_dtypes.bfloat16)


def _build(config: Config, context: BuildContext) -> Decoder:
    sizes = Sizes.read(config)
    router = RouterProblem(
        dtype=context.dtype, experts=count(config, "num_local_experts"), k=count(config, "num_experts_per_tok"),
        softmax="after",
    )  # fmt: skip
    activation = {
        "activation": "swigluoai", "swiglu_alpha": number(config, "swiglu_alpha"),
        "swiglu_limit": number(config, "swiglu_limit"),
    }  # fmt: skip
    experts = ExpertMlp(
        context=context, hidden=sizes.shape.hidden, width=sizes.shape.intermediate, router=router, gate="router",
        bias=True, stored=FusedExperts(_is_mxfp4(config)), activation=activation,
    )  # fmt: skip
    norm = RmsNorm(context, sizes.shape.hidden, sizes.eps)
    windows = layer_windows(config, sizes.layers, lambda layer: layer % 2 == 0)
    turned, bias = rope(config, context, base=150000.0), flag(config, "attention_bias")
    found = attentions(context, sizes, windows, turned, qkv_bias=bias, out_bias=bias, sinks=True)
    return Decoder(context, sizes, [Layer(attention, experts, norm) for attention in found], norm)


def _is_mxfp4(config: Config) -> bool:
    given = config.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method not in (None, "mxfp4"):
        raise UnknownArchitecture(
            f"config.json: quantization_config is {given!r:.80}; the gpt_oss family reads mxfp4 and plain numbers only"
        )
    return method == "mxfp4"


FAMILY = checked_family("gpt_oss", ("GptOssForCausalLM", "gpt_oss"), _build, ONLY, ABSENT)
