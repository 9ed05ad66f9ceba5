"""Says what a GGUF file says in Hugging Face words: tensor names and config.json keys, per architecture.

Knows nothing of the binary format. Of an architecture that is not listed here the words are left as they are, so
that no model can take its tensors for something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from lineshaft.errors import CorruptCheckpoint
from lineshaft_contract.ops.rope import rope_frequencies
from lineshaft_contract.problems import RopeProblem, RopeScaling


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture is called and stored.

    permuted: q and k rows are interleaved within each head. words: its own names of a layer's parts, before those of
    `_LAYER`; stacked experts' have a `{}` for the expert's number. norm_offset: what the file has added to the weights
    of norms. more: what else its config.json says.
    """

    model_type: str
    architecture: str
    permuted: bool = False
    words: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    more: Callable[[Words, dict[str, Any]], dict[str, Any]] = lambda words, config: {}


_QWEN_EXPERTS: Final[Mapping[str, str]] = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_MIXTRAL_EXPERTS: Final[Mapping[str, str]] = {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
_GEMMA_NORMS: Final[Mapping[str, str]] = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED: Final[Mapping[str, str]] = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GEMMA_27B_LAYERS: Final = 62
"""The one Gemma 3 whose scores are not scaled by the size of a head; its files do not say so."""


def _gemma3(words: Words, config: dict[str, Any]) -> dict[str, Any]:
    largest = config["num_hidden_layers"] == _GEMMA_27B_LAYERS
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    every = words.number("attention.sliding_window_pattern")
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": float(words.positive("rope.freq_base_swa", 10000.0)),
    } | ({"sliding_window_pattern": every} if every else {})


_MIXTRAL: Final = Family("mixtral", "MixtralForCausalLM", True, _MIXTRAL_EXPERTS)
_MISTRAL: Final = Family("mistral", "MistralForCausalLM", True)
_FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family("llama", "LlamaForCausalLM", True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", False, _GEMMA_NORMS, norm_offset=1.0, more=_gemma3),
    "phi3": Family("phi3", "Phi3ForCausalLM", False, _FUSED),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", False, _QWEN_EXPERTS),
}
_TOP: Final[Mapping[str, str]] = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_LAYER: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS: Final[Mapping[str, str]] = {
    "rope_freqs.weight": "divisors",
    "rope_factors_short.weight": "short_factor",
    "rope_factors_long.weight": "long_factor",
}
"""Tensors that are part of a config, as keys of its rope_scaling: what the rotary frequencies are divided by."""
_NAME: Final = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")

# config.json key -> GGUF key after "<architecture>."; `required` ones must be there
_REQUIRED: Final[Mapping[str, str]] = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_OPTIONAL: Final[Mapping[str, str]] = {
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "sliding_window": "attention.sliding_window",
}


def family_of(metadata: Mapping[str, Any]) -> Family | None:
    """The family of a file's `general.architecture`; None if it is not one of those listed."""
    arch = metadata.get("general.architecture")
    if arch == "llama" and metadata.get("llama.expert_count"):
        return _MIXTRAL
    if arch == "llama" and metadata.get("llama.attention.sliding_window"):
        return _MISTRAL
    return _FAMILIES.get(arch) if isinstance(arch, str) else None


def tensor_name(name: str, family: Family | None) -> str:
    """The Hugging Face name of a tensor; that of stacked experts holds a `{}` for the expert's number."""
    match = _NAME.fullmatch(name)
    if match is None or family is None:
        return name
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_TOP[part]}.{kind}" if part in _TOP else name
    word = family.words.get(part) or _LAYER.get(part)
    return f"model.layers.{layer}.{word}.{kind}" if word else name


def config_of(
    metadata: Mapping[str, Any], names: frozenset[str], rope_factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """A config.json's content from a file's metadata.

    `names` are the tensors' Hugging Face names; `rope_factors` the values `[head_dim / 2]` of those of `ROPE_FACTORS`
    that the file has, under their keys.
    Raises CorruptCheckpoint, naming the key, where a listed architecture lacks one or has it of a wrong type.
    """
    family = family_of(metadata)
    if family is None:
        arch = metadata.get("general.architecture")
        return {"model_type": arch, "architectures": [] if arch is None else [arch]}
    words = Words(metadata, str(metadata["general.architecture"]))
    config = _sizes(words) | {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": any(name.endswith("q_proj.bias") for name in names),
        "mlp_bias": any(name.endswith("up_proj.bias") for name in names),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if experts := words.number("expert_count"):
        config |= {"num_experts": experts, "num_local_experts": experts, "norm_topk_prob": True}
    if (rotated := words.number("rope.dimension_count")) is not None:
        config["partial_rotary_factor"] = rotated / max(1, config["head_dim"])
    return config | _rope(words, rope_factors) | family.more(words, config)


@dataclass(frozen=True)
class Words:
    """Typed look-ups of the keys of one architecture."""

    metadata: Mapping[str, Any]
    arch: str

    def number(self, key: str) -> Any:
        """A number, or None; a list of equal numbers, one a layer, counts as that number."""
        value = self.metadata.get(f"{self.arch}.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
            return value
        raise CorruptCheckpoint(f"the GGUF key {self.arch}.{key} must be one number; convert the model again")

    def positive(self, key: str, default: float | None = None) -> Any:
        """A number above 0; `default` where the file has none, or 0."""
        found = self.number(key)
        value = found or default
        if value is None or value <= 0:
            raise CorruptCheckpoint(f"the GGUF key {self.arch}.{key} is {found}, not > 0; convert the model again")
        return value


def _sizes(words: Words) -> dict[str, Any]:
    config = {key: words.positive(name) for key, name in _REQUIRED.items()}
    config |= {key: value for key, name in _OPTIONAL.items() if (value := words.number(name)) is not None}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = words.positive("attention.head_count_kv", heads)
    config["head_dim"] = words.positive("attention.key_length", config["hidden_size"] // heads)
    tokens = words.metadata.get("tokenizer.ggml.tokens")
    config["vocab_size"] = len(tokens) if isinstance(tokens, list) else words.positive("vocab_size")
    return config


def _rope(words: Words, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    base = float(words.positive("rope.freq_base", 10000.0))
    original = words.number("rope.scaling.original_context_length")
    stated = {"original_max_position_embeddings": original} if original else {}
    if "divisors" in factors:
        return {"rope_theta": base, "rope_scaling": _divided(base, factors["divisors"])}
    if "short_factor" in factors and "long_factor" in factors:
        raised = words.number("rope.scaling.attn_factor")
        scaling = {"rope_type": "longrope", **factors} | ({"attention_factor": float(raised)} if raised else {})
        return {"rope_theta": base, "rope_scaling": scaling | stated, **stated}
    kind = words.metadata.get(f"{words.arch}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_theta": base, "rope_scaling": None}
    scaling = {"rope_type": kind, "factor": float(words.positive("rope.scaling.factor"))}
    found = {key: words.number(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    scaling |= {key: float(value) for key, value in found.items() if value}
    return {"rope_theta": base, "rope_scaling": scaling | stated}


def _divided(base: float, divisors: Sequence[float]) -> dict[str, Any]:
    """Divisors of the frequencies as "llama3" scaling, if they are that: other engines know no divisors."""
    bounds: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # no others were ever published
    scaling = RopeScaling(kind="llama3", factor=max(divisors), original_context=8192, **bounds)
    plain = RopeProblem(dtype="float32", dim=2 * len(divisors), base=base)
    with np.errstate(all="ignore"):  # of a damaged file
        expected = rope_frequencies(plain) / rope_frequencies(replace(plain, scaling=scaling))
    if not np.allclose(divisors, expected, rtol=1e-4):  # the file holds float32 of a float32 computation
        return {"rope_type": "divisors", "divisors": divisors}
    original = {"original_max_position_embeddings": scaling.original_context}
    return {"rope_type": "llama3", "factor": scaling.factor, **bounds, **original}
