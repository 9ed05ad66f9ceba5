"""GGUF files: tensors in stored form under Hugging Face names, Llama's rows put back, config in config.json's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from lineshaft.errors import CorruptCheckpoint, LayoutError, MisshapenTensor, ModelNotFound
from lineshaft.weights.checkpoint import open_checkpoint
from lineshaft_contract.schemes import dequantize

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
HEADS, KV_HEADS = 4, 2
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

CONFIG_KEYS = [
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
]


def as_gguf_stores(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What the converter does to q and k of Llama models: interleave the two halves of every head."""
    out, columns = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, columns).swapaxes(1, 2).reshape(out, columns)


def converted(plain: dict[str, Any], quantize: bool = True) -> dict[str, Any]:
    """The tensors as a converter would write them: q and k permuted, matrices in blocks."""
    tensors = dict(plain)
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        name = f"blk.0.attn_{part}.weight"
        tensors[name] = as_gguf_stores(plain[name], heads)
    kind = gguf.GGMLQuantizationType.Q8_0
    if quantize:
        tensors |= {name: (gguf.quantize(x, kind), kind) for name, x in tensors.items() if x.ndim == 2}
    return tensors


def whole(checkpoint: Any, name: str) -> np.ndarray[Any, Any]:
    return dequantize(checkpoint.rows(name, 0, checkpoint.shape(name)[0]), "float32")


def test_permuted_rows_are_put_back_whatever_the_cut(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(write_gguf(converted(plain_tensors, quantize=False)))
    for name, key in ((Q, "blk.0.attn_q.weight"), (K, "blk.0.attn_k.weight")):
        expected = plain_tensors[key]
        np.testing.assert_array_equal(whole(checkpoint, name), expected)
        np.testing.assert_array_equal(dequantize(checkpoint.rows(name, 5, 23), "float32"), expected[5:23])
        np.testing.assert_array_equal(dequantize(checkpoint.cols(name, 3, 40), "float32"), expected[:, 3:40])


def test_blocks_stay_blocks(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(write_gguf(converted(plain_tensors)))
    stored = checkpoint.rows("model.layers.0.mlp.down_proj.weight", 0, 64)
    assert stored.scheme == "q8_0" and stored.shape == (64, 96)
    assert stored.arrays["data"].dtype == np.uint8 and stored.arrays["data"].shape == (64, 3 * 34)
    assert not stored.arrays["data"].flags.owndata
    assert checkpoint.stored_bytes("model.layers.0.mlp.down_proj.weight") == 64 * 3 * 34
    assert checkpoint.rows("model.norm.weight", 0, 64).scheme == "none"


def test_columns_are_cut_on_block_borders_only(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(write_gguf(converted(plain_tensors)))
    name = "model.layers.0.mlp.down_proj.weight"
    full = whole(checkpoint, name)
    np.testing.assert_array_equal(dequantize(checkpoint.cols(name, 32, 96), "float32"), full[:, 32:96])
    np.testing.assert_array_equal(dequantize(checkpoint.cols(Q, 32, 64), "float32"), whole(checkpoint, Q)[:, 32:])
    for start, stop in ((48, 96), (32, 80)):
        with pytest.raises(LayoutError, match=rf"blocks of 32 columns.*{start}:{stop}"):
            checkpoint.cols(name, start, stop)
    with pytest.raises(MisshapenTensor, match="2 dims"):
        checkpoint.cols("model.norm.weight", 0, 32)


def test_config_is_in_hugging_face_words(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    config = open_checkpoint(write_gguf(converted(plain_tensors))).config
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "rms_norm_eps": pytest.approx(1e-5),
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": 40,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def test_a_partial_rope_is_told(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    config = open_checkpoint(write_gguf(converted(plain_tensors), changes={"rope.dimension_count": 4})).config
    assert config["partial_rotary_factor"] == 0.25


def test_an_output_matrix_unties_the_embeddings(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(write_gguf(plain_tensors | {"output.weight": plain_tensors["token_embd.weight"]}))
    assert "lm_head.weight" in checkpoint.names() and not checkpoint.config["tie_word_embeddings"]


def test_q_and_k_of_other_architectures_are_left_alone(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]
) -> None:
    bias = np.arange(64, dtype=np.float32)
    checkpoint = open_checkpoint(write_gguf(plain_tensors | {"blk.0.attn_q.bias": bias}, arch="qwen2"))
    np.testing.assert_array_equal(whole(checkpoint, Q), plain_tensors["blk.0.attn_q.weight"])
    assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"] and checkpoint.config["attention_bias"]


def test_llama_biases_are_put_back_too(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    bias = np.arange(64, dtype=np.float32)
    stored = as_gguf_stores(bias[:, None], HEADS)[:, 0]
    checkpoint = open_checkpoint(write_gguf(plain_tensors | {"blk.0.attn_q.bias": stored}))
    np.testing.assert_array_equal(whole(checkpoint, Q.replace("weight", "bias")), bias)


def test_an_unknown_architecture_keeps_its_own_words(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(write_gguf(plain_tensors, arch="mamba"))
    assert "token_embd.weight" in checkpoint.names()
    assert checkpoint.config == {"model_type": "mamba", "architectures": ["mamba"]}


def test_stacked_experts_come_apart(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    stacked = np.random.default_rng(2).standard_normal((3, 96, 64)).astype(np.float32)
    tensors = plain_tensors | {"blk.0.ffn_gate_exps.weight": stacked}
    checkpoint = open_checkpoint(write_gguf(tensors, "qwen3moe", {"expert_count": 3, "expert_used_count": 2}))
    assert checkpoint.config["num_experts"] == 3 and checkpoint.config["num_experts_per_tok"] == 2
    for expert in range(3):
        name = f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"
        np.testing.assert_array_equal(whole(checkpoint, name), stacked[expert])


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_is_plain(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any], kind: str) -> None:
    dtype = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}[kind]
    halves = plain_tensors["token_embd.weight"].astype(dtype)
    raw = halves if kind == "F16" else (halves.view(np.uint8), gguf.GGMLQuantizationType.BF16)
    stored = open_checkpoint(write_gguf(plain_tensors | {"token_embd.weight": raw})).rows(
        "model.embed_tokens.weight", 0, 40
    )
    assert stored.scheme == "none" and stored.arrays["data"].dtype == dtype
    np.testing.assert_array_equal(stored.arrays["data"], halves)


def test_llama3_rope_factors_become_rope_scaling(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]
) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(head_dim=16, rope_parameters=rope), "cpu")
    factors = np.round(500000.0 ** (-np.arange(0, 16, 2) / 16) / scaled.numpy(), 5).astype(np.float32)
    assert factors.min() == 1.0 and factors.max() == 32.0
    checkpoint = open_checkpoint(write_gguf(plain_tensors | {"rope_freqs.weight": factors}))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}


def test_other_rope_factors_are_kept_as_they_are(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]
) -> None:
    factors = np.linspace(1, 2, 8, dtype=np.float32)
    scaling = open_checkpoint(write_gguf(plain_tensors | {"rope_freqs.weight": factors})).config["rope_scaling"]
    assert scaling["rope_type"] == "divisors"
    np.testing.assert_array_equal(scaling["divisors"], factors)


def split(write_gguf: Callable[..., Path], tensors: dict[str, Any], files: int) -> list[Path]:
    """A model in several files, as `gguf-split` makes them: keys in each, tensors dealt out."""
    paths = []
    for number in range(files):
        some = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % files == number}
        path = write_gguf(some, keys={"split.count": files, "split.no": number})
        paths.append(path.rename(path.with_name(f"m-{number + 1:05}-of-{files:05}.gguf")))
    return paths


def test_a_model_in_several_files_is_one(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    paths = split(write_gguf, converted(plain_tensors), 3)
    one = open_checkpoint(write_gguf(converted(plain_tensors)))
    for path in paths:
        several = open_checkpoint(path)
        assert several.names() == one.names() and several.config == one.config
        np.testing.assert_array_equal(whole(several, Q), whole(one, Q))


def test_files_of_a_split_model_must_all_be_there_once(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]
) -> None:
    paths = split(write_gguf, plain_tensors, 3)
    third = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(ModelNotFound, match="m-00003-of-00003"):
        open_checkpoint(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"m-00003-of-00003\.gguf holds tensor .* as a file before"):
        open_checkpoint(paths[0])
    paths[2].write_bytes(third)
    renamed = paths[0].rename(paths[0].with_name("first.gguf"))
    with pytest.raises(CorruptCheckpoint, match="one of 3 files; keep them in one folder"):
        open_checkpoint(renamed)


def test_a_llama_with_a_window_is_a_mistral(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    path = write_gguf(converted(plain_tensors, quantize=False), changes={"attention.sliding_window": 32})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["architectures"] == ["MistralForCausalLM"] and checkpoint.config["sliding_window"] == 32
    np.testing.assert_array_equal(whole(checkpoint, Q), plain_tensors["blk.0.attn_q.weight"])


@pytest.mark.parametrize(
    ("layers", "scalar"), [(1, 8), (62, 16)], ids=["by the head", "of the largest, by width over heads"]
)
def test_what_gemma_files_do_not_say(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any], layers: int, scalar: int
) -> None:
    changes = {"block_count": layers, "attention.key_length": 8, "attention.sliding_window_pattern": 2}
    config = open_checkpoint(write_gguf(plain_tensors, "gemma3", changes)).config
    assert config["query_pre_attn_scalar"] == scalar
    assert config["rope_local_base_freq"] == 10000.0 and config["sliding_window_pattern"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedding_length": None}, r"llama\.embedding_length is None"),
        ({"block_count": "many"}, r"llama\.block_count must be one number"),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0"),
        ({"attention.head_count_kv": 5}, "not an even number for each of 5 heads"),
    ],
)
def test_wrong_keys_are_refused(
    write_gguf: Callable[..., Path], plain_tensors: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CorruptCheckpoint, match=words) as caught:
        open_checkpoint(write_gguf(plain_tensors, changes=changes))
    assert "llama.gguf" in str(caught.value)


@pytest.fixture(scope="module")
def reference_model(smollm2: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )


def test_smollm2_is_what_transformers_loads(smollm2: Path, reference_model: Any) -> None:
    checkpoint = open_checkpoint(smollm2)
    theirs = reference_model.state_dict()
    assert checkpoint.names() == set(theirs) - {"lm_head.weight"}
    layer = "model.layers.7."
    for name in ["model.norm.weight", *(name for name in theirs if name.startswith(layer))]:
        assert checkpoint.shape(name) == theirs[name].shape
        np.testing.assert_array_equal(whole(checkpoint, name), theirs[name].numpy(), err_msg=name)
    some = dequantize(checkpoint.rows("model.embed_tokens.weight", 100, 132), "float32")
    np.testing.assert_array_equal(some, theirs["model.embed_tokens.weight"][100:132].numpy())


def test_smollm2_config_is_what_transformers_says(smollm2: Path, reference_model: Any) -> None:
    ours, theirs = open_checkpoint(smollm2).config, reference_model.config
    for key in CONFIG_KEYS:
        assert ours[key] == getattr(theirs, key), key
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"]
