"""Blocks of experts and latent attention: what each rank is given, and the configs that their families refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import CorruptCheckpoint, LineshaftError, MisshapenTensor, UnknownArchitecture
from lineshaft.layout import Degrees
from lineshaft.models import BuildContext, deepseek, gpt_oss, mixtral, qwen3_moe
from lineshaft.models.decoder import Decoder
from lineshaft.models.gpt_oss import decode_mxfp4
from lineshaft.plan.trace import distinct_params
from lineshaft.weights.memory import local_bytes
from lineshaft_contract.schemes import check_parts
from lineshaft_contract.sessions import Tree, leaves
from lineshaft_contract.weights import Coordinate, Param, Stored

E, H, F = 3, 32, 64
PLAIN: dict[str, Any] = {
    "hidden_size": H, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 10,
    "intermediate_size": F, "num_hidden_layers": 1,
}  # fmt: skip
ROUTED: dict[str, Any] = PLAIN | {"num_local_experts": E, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = PLAIN | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": F, "kv_lora_rank": 6, "q_lora_rank": 5,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
}  # fmt: skip
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
FAMILIES: dict[str, tuple[Callable[..., Decoder], dict[str, Any]]] = {
    "mixtral": (mixtral.FAMILY.build, ROUTED),
    "qwen3_moe": (qwen3_moe.FAMILY.build, ROUTED | {"moe_intermediate_size": F}),
    "gpt_oss": (gpt_oss.FAMILY.build, ROUTED),
    "gpt_oss-mxfp4": (gpt_oss.FAMILY.build, ROUTED | MXFP4),
    "deepseek_v2": (deepseek.FAMILY.build, LATENT),
}


class Anything:
    """A checkpoint with every tensor that is asked for, each of its own numbers, or bytes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Stored:
        rng, shape = np.random.default_rng(len(name)), self.shapes[name]
        packed = name.endswith(("_blocks", "_scales"))
        data = rng.integers(100, 130, shape, dtype=np.uint8) if packed else rng.standard_normal(shape)
        return Stored("none", data[start:stop].shape, {"data": data[start:stop]})

    def cols(self, name: str, start: int, stop: int) -> Stored:
        data = self.rows(name, 0, self.shapes[name][0]).arrays["data"][:, start:stop]
        return Stored("none", data.shape, {"data": data})


class Wanted(dict[str, tuple[int, ...]]):
    """Learns the shape of each tensor from the error of a shard function that is told a wrong one."""

    def of(self, param: Param) -> None:
        for _ in range(100):
            try:
                param.shard(Anything(self), Coordinate())
                return
            except KeyError as error:
                self[error.args[0]] = ()
            except MisshapenTensor as error:
                name, asked = str(error).split()[1], str(error).rsplit("[", 1)[1].rstrip("]")
                self[name] = tuple(map(int, asked.split(",")))


def share(param: Param, shapes: Wanted, tp: int) -> np.ndarray[Any, Any]:
    local = param.shard(Anything(shapes), Coordinate(tp=tp))
    check_parts(param, local)
    return np.concatenate([np.asarray(part.arrays["data"], np.float64) for part in local.parts]).reshape(param.shape)


def weights(family: str, tp: int) -> dict[str, Param]:
    build, config = FAMILIES[family]
    tree: Tree = build(config, BuildContext("float32", "float32", 16, Degrees(tp=tp))).params()
    return {param.name: param for param in leaves(tree)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_two_ranks_are_given_is_what_one_is_given(family: str) -> None:
    whole, halves, shapes = weights(family, 1), weights(family, 2), Wanted()
    for name, param in whole.items():
        shapes.of(param)
        one = share(param, shapes, 0)
        first, second = (share(halves[name], shapes, tp) for tp in range(2))
        key = name.rsplit(".", 1)[-1]
        if key in ("w13", "w13_bias"):
            gates, ups = zip(*(np.split(part, 2, 1) for part in (first, second)), strict=True)
            np.testing.assert_array_equal(np.concatenate([*gates, *ups], 1), one)
        elif key == "w2":
            np.testing.assert_array_equal(np.concatenate([first, second], 2), one)
        elif key in ("w2_bias", "out_bias"):
            np.testing.assert_array_equal(first, one)
            assert not second.any()
        elif key in ("k_up", "v_up"):
            np.testing.assert_array_equal(np.concatenate([first, second]), one)
        elif key in ("router", "router_bias", "expert_map", "kv_norm", "q_norm"):
            np.testing.assert_array_equal(first, one)
            np.testing.assert_array_equal(second, one)


def test_a_fused_tensor_is_taken_apart() -> None:
    """Column 2i of gate_up_proj is row i of the gate, and its neighbour row i of up."""
    params, shapes = weights("gpt_oss", 1), Wanted()
    for key, part in (("w13", "gate_up_proj"), ("w13_bias", "gate_up_proj_bias"), ("w2", "down_proj")):
        shapes.of(param := params[f"layers.0.{key}"])
        name = f"model.layers.0.mlp.experts.{part}"
        stored, found = Anything(shapes).rows(name, 0, E).arrays["data"], share(param, shapes, 0)
        if key == "w2":
            np.testing.assert_array_equal(found, stored.transpose(0, 2, 1))
        else:
            turned = stored if stored.ndim == 2 else stored.transpose(0, 2, 1)
            np.testing.assert_array_equal(found[:, :F], turned[:, 0::2])
            np.testing.assert_array_equal(found[:, F:], turned[:, 1::2])


def test_mxfp4_holds_the_lower_code_first() -> None:
    codes = np.arange(32) % 16
    blocks = (codes[0::2] | codes[1::2] << 4).astype(np.uint8).reshape(1, 1, 16)
    plain = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for scale, factor in ((127, 1.0), (130, 8.0), (120, 2.0**-7)):
        found = decode_mxfp4(blocks, np.array([[scale]], np.uint8)).astype(np.float64)
        np.testing.assert_array_equal(found, [factor * np.array([*plain, *np.negative(plain)] * 2)])


@pytest.mark.parametrize("tp", [1, 2])
def test_the_estimate_counts_every_expert(tp: int) -> None:
    built = mixtral.FAMILY.build(ROUTED, BuildContext("bfloat16", "bfloat16", 16, Degrees(tp=tp)))
    params = [param for param in distinct_params(built.params()) if param.name.rsplit(".", 1)[-1] in ("w13", "w2")]
    assert local_bytes(params, {}) == 2 * E * 3 * H * F // tp


def test_a_latent_is_one_head_on_every_rank() -> None:
    build, config = FAMILIES["deepseek_v2"]
    (cache,) = build(config, BuildContext("float32", "float32", 16, Degrees(tp=4))).caches()
    assert (cache.kv_heads, cache.qk_dim, cache.v_dim) == (1, 8, 0)


def test_layers_without_experts() -> None:
    config = FAMILIES["qwen3_moe"][1] | {"num_hidden_layers": 5, "mlp_only_layers": [3], "decoder_sparse_step": 2}
    built = qwen3_moe.FAMILY.build(config, BuildContext("float32", "float32", 16, Degrees()))
    assert ["w13" in layer["mlp"] for layer in built.params()["layers"]] == [False, True, False, False, False]


def test_windows_take_turns_unless_the_config_says_otherwise() -> None:
    config = ROUTED | {"num_hidden_layers": 4, "sliding_window": 9}

    def windows(**more: Any) -> list[int]:
        built = gpt_oss.FAMILY.build(config | more, BuildContext("float32", "float32", 16, Degrees()))
        uses = [layer.attention.uses() for layer in built.layers]
        return [problem.window for used in uses for op, problem in used.values() if op == "attend"]

    assert windows() == [9, 0, 9, 0]
    assert windows(layer_types=["full_attention"] * 3 + ["sliding_attention"]) == [0, 0, 0, 9]


REFUSED: list[tuple[str, dict[str, Any], type[LineshaftError], str]] = [
    ("mixtral", {"hidden_act": "gelu"}, UnknownArchitecture, "hidden_act is 'gelu'"),
    ("mixtral", {"num_experts_per_tok": 4}, CorruptCheckpoint, "4 experts per token are more than the 3"),
    ("qwen3_moe", {"mlp_only_layers": 3}, CorruptCheckpoint, "mlp_only_layers is 3, it must be a list"),
    ("qwen3_moe", {"num_local_experts": None}, CorruptCheckpoint, "num_experts is None"),
    (
        "gpt_oss",
        {"quantization_config": {"quant_method": "gptq"}},
        UnknownArchitecture,
        "reads mxfp4 and plain numbers",
    ),
    ("gpt_oss", {"layer_types": ["linear_attention"]}, UnknownArchitecture, "layer type 'linear_attention'"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, UnknownArchitecture, "'noaux_tc'; .* greedy and group_limited_greedy"),
    ("deepseek_v2", {"norm_topk_prob": True}, UnknownArchitecture, "norm_topk_prob is True"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}, CorruptCheckpoint, "n_group is None"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, UnknownArchitecture, "scoring_func is 'sigmoid'"),
]


@pytest.mark.parametrize(("family", "changed", "error", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_config_that_is_not_computed_is_refused(
    family: str, changed: dict[str, Any], error: type[LineshaftError], words: str
) -> None:
    build, config = FAMILIES[family]
    with pytest.raises(error, match=words):
        build(config | changed, BuildContext("float32", "float32", 16, Degrees()))
