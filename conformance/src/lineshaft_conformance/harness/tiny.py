"""Seeded random models of every architecture that core has, small enough for any machine, as checkpoints on disk.

Weights are rounded to bfloat16, so that every executed dtype loads the same values and rounding them is no error.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lineshaft_conformance.subject import Subject

Shapes = dict[str, tuple[int, ...]]
Part = Callable[[Mapping[str, Any], int], Shapes]
"""The tensors of one part of a layer, without the layer's prefix, by config and number of the layer."""

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "vocab_size": 131, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip

ROPE: Mapping[str, Any] = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip

TINY: Mapping[str, Mapping[str, Any]] = {
    "llama-gqa1": {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "llama-gqa3-tied": {**LLAMA, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-gqa8": {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 10},
    "llama-rope3": {**LLAMA, "rope_scaling": ROPE},
}
"""config.json of each tiny model, in the words of Hugging Face: odd sizes, and one thing special about each."""

ROUTED: Mapping[str, Any] = {**LLAMA, "intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2}

FEATURED: Mapping[str, Mapping[str, Any]] = {
    "mistral": {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7},
    "qwen2": {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": 8},
    "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False},
    "gemma3": {
        **LLAMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 7,
        "query_pre_attn_scalar": 20, "sliding_window_pattern": 2,
    },
    "phi3": {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "head_dim": 8},
    "mixtral": {**ROUTED, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": 9},
    "qwen3-moe": {
        **ROUTED, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 20,
        "norm_topk_prob": True, "mlp_only_layers": [0],
    },
    "gpt-oss": {
        **ROUTED, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 7,
        "swiglu_limit": 0.75,
    },
    "deepseek-v2": {
        **LLAMA, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.0,
        "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    },
}  # fmt: skip
"""The same of models most of which need ops or features beyond the required ones."""

EVEN: Mapping[str, Any] = {**LLAMA, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
"""What two workers can share."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a folder of its own, which `close` removes."""

    folder: tempfile.TemporaryDirectory[str]

    @property
    def path(self) -> Path:
        return Path(self.folder.name)

    def close(self) -> None:
        self.folder.cleanup()


def tiny(subject: Subject, name: str, seed: int) -> Path:
    """The folder of a tiny model, written once for a subject and a seed."""
    return checkpoint(subject, f"tiny model {name}", {**TINY, **FEATURED}[name], seed)


def checkpoint(subject: Subject, key: str, config: Mapping[str, Any], seed: int) -> Path:
    """The folder of a model with this config; `key` names it among all that a subject keeps."""
    kept: Checkpoint = subject.keep((key, seed), lambda: write(config, seed))
    return kept.path


def write(config: Mapping[str, Any], seed: int) -> Checkpoint:
    """A checkpoint with random weights. Raises KeyError for an architecture whose tensors are not known here."""
    made = Checkpoint(tempfile.TemporaryDirectory(prefix="lineshaft-tiny-"))
    rng = np.random.default_rng([seed, 4])
    shapes = tensors(config, *TENSORS[config["model_type"]])
    (made.path / "config.json").write_text(json.dumps(config))
    save_file({name: values(rng, shape) for name, shape in shapes.items()}, made.path / "model.safetensors")
    return made


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Norm weights near 1; matrices that keep the size of what they multiply."""
    drawn = rng.standard_normal(shape, np.float32)
    kept = 1 + drawn / 8 if len(shape) == 1 else drawn * np.float32(shape[-1] ** -0.5)
    return kept.astype(ml_dtypes.bfloat16).astype(np.float32)


def tensors(config: Mapping[str, Any], attention: Part, mlp: Part) -> Shapes:
    """Name and shape of every tensor of a checkpoint whose layers have these parts."""
    hidden = config["hidden_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        for part in (attention, mlp):
            shapes |= {at + name: shape for name, shape in part(config, layer).items()}
    return shapes


def heads(config: Mapping[str, Any], layer: int) -> Shapes:
    hidden, dim = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: Shapes = {f"self_attn.{name}_proj.weight": (n, hidden) for name, n in (("q", q), ("k", kv), ("v", kv))}
    return {**shapes, "self_attn.o_proj.weight": (hidden, q)}


def normed_heads(config: Mapping[str, Any], layer: int) -> Shapes:
    return heads(config, layer) | {f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}


def biased_heads(config: Mapping[str, Any], layer: int) -> Shapes:
    shapes = heads(config, layer)
    return shapes | {f"self_attn.{name}_proj.bias": shapes[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"}


def fused_heads(config: Mapping[str, Any], layer: int) -> Shapes:
    shapes, hidden = heads(config, layer), config["hidden_size"]
    rows = sum(shapes.pop(f"self_attn.{name}_proj.weight")[0] for name in "qkv")
    return shapes | {"self_attn.qkv_proj.weight": (rows, hidden)}


def heads_with_sinks(config: Mapping[str, Any], layer: int) -> Shapes:
    shapes = heads(config, layer)
    biases: Shapes = {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes | biases | {"self_attn.sinks": (config["num_attention_heads"],)}


def latents(config: Mapping[str, Any], layer: int) -> Shapes:
    hidden, count, q_rank, rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    shapes: Shapes = {
        "q_a_proj": (q_rank, hidden), "q_a_layernorm": (q_rank,), "q_b_proj": (count * (nope + rope), q_rank),
        "kv_a_proj_with_mqa": (rank + rope, hidden), "kv_a_layernorm": (rank,),
        "kv_b_proj": (count * (nope + value), rank), "o_proj": (hidden, count * value),
    }  # fmt: skip
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}


def gated(hidden: int, width: int, at: str = "mlp.", names: str = "gate_proj up_proj down_proj") -> Shapes:
    gate, up, down = names.split()
    shapes: Shapes = {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
    return {f"{at}{name}.weight": shape for name, shape in shapes.items()}


def dense(config: Mapping[str, Any], layer: int) -> Shapes:
    return gated(config["hidden_size"], config["intermediate_size"])


def fused_dense(config: Mapping[str, Any], layer: int) -> Shapes:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    return {"mlp.gate_up_proj.weight": (2 * width, hidden), "mlp.down_proj.weight": (hidden, width)}


def normed_dense(config: Mapping[str, Any], layer: int) -> Shapes:
    return dense(config, layer) | {
        f"{place}_feedforward_layernorm.weight": (config["hidden_size"],) for place in ("pre", "post")
    }


def mixtral(config: Mapping[str, Any], layer: int) -> Shapes:
    hidden, width, count = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts"))
    shapes: Shapes = {"block_sparse_moe.gate.weight": (count, hidden)}
    for e in range(count):
        shapes |= gated(hidden, width, f"block_sparse_moe.experts.{e}.", "w1 w3 w2")
    return shapes


def routed(config: Mapping[str, Any], layer: int) -> Shapes:
    """Experts beside dense layers, and shared ones, of Qwen3-MoE and DeepSeek-V2."""
    if layer in config.get("mlp_only_layers", ()) or layer < config.get("first_k_dense_replace", 0):
        return dense(config, layer)
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    count = config.get("n_routed_experts") or config["num_local_experts"]
    shapes: Shapes = {"mlp.gate.weight": (count, hidden)}
    for e in range(count):
        shapes |= gated(hidden, width, f"mlp.experts.{e}.")
    return shapes | (gated(hidden, width, "mlp.shared_experts.") if "n_shared_experts" in config else {})


def fused(config: Mapping[str, Any], layer: int) -> Shapes:
    hidden, width, count = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts"))
    shapes: Shapes = {
        "router.weight": (count, hidden), "router.bias": (count,), "experts.gate_up_proj": (count, hidden, 2 * width),
        "experts.gate_up_proj_bias": (count, 2 * width), "experts.down_proj": (count, width, hidden),
        "experts.down_proj_bias": (count, hidden),
    }  # fmt: skip
    return {f"mlp.{name}": shape for name, shape in shapes.items()}


TENSORS: Mapping[str, tuple[Part, Part]] = {
    "llama": (heads, dense), "mistral": (heads, dense), "qwen2": (biased_heads, dense), "qwen3": (normed_heads, dense),
    "gemma3_text": (normed_heads, normed_dense), "phi3": (fused_heads, fused_dense), "mixtral": (heads, mixtral),
    "qwen3_moe": (normed_heads, routed), "gpt_oss": (heads_with_sinks, fused), "deepseek_v2": (latents, routed),
}  # fmt: skip
"""The parts of a layer by `model_type`."""
