"""Says what a GGUF file says in Hugging Face words: tensor names and config.json keys, per architecture.

Knows nothing of the binary format. Of an architecture that is not listed here the words are left as they are, so
that no model can take its tensors for something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from lineshaft.errors import CorruptCheckpoint


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


_QWEN_EXPERTS: Final = MappingProxyType(
    {
        "ffn_gate_exps": "mlp.experts.{}.gate_proj",
        "ffn_up_exps": "mlp.experts.{}.up_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj",
        "ffn_gate_inp": "mlp.gate",
    }
)
_MIXTRAL_EXPERTS: Final = MappingProxyType(
    {
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_gate_inp": "block_sparse_moe.gate",
    }
)
_GEMMA_NORMS: Final = MappingProxyType(
    {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
_FUSED: Final = MappingProxyType({"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"})
_GEMMA_27B_LAYERS: Final = 62
"""The one Gemma 3 whose scores are not scaled by the size of a head; its files do not say so."""


def _gemma3(words: Words, config: dict[str, Any]) -> dict[str, Any]:
    largest = config["num_hidden_layers"] == _GEMMA_27B_LAYERS
    every = words.number("attention.sliding_window_pattern")
    return {
        **({"sliding_window_pattern": every} if every else {}),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if largest
        else config["head_dim"],
        "rope_local_base_freq": float(words.number("rope.freq_base_swa") or 10000.0),
    }


_MIXTRAL: Final = Family("mixtral", "MixtralForCausalLM", True, _MIXTRAL_EXPERTS)
_MISTRAL: Final = Family("mistral", "MistralForCausalLM", True)
_FAMILIES: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "llama": Family("llama", "LlamaForCausalLM", True),
        "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
        "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
        "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", False, _GEMMA_NORMS, norm_offset=1.0, more=_gemma3),
        "phi3": Family("phi3", "Phi3ForCausalLM", False, _FUSED),
        "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", False, _QWEN_EXPERTS),
    }
)
_TOP: Final = MappingProxyType({"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"})
_LAYER: Final = MappingProxyType(
    {
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
)
PLAIN_FACTORS, SHORT_FACTORS, LONG_FACTORS = (
    "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight",
)  # fmt: skip
ROPE_FACTORS: Final = (PLAIN_FACTORS, SHORT_FACTORS, LONG_FACTORS)
"""Tensors that are part of a config: what the rotary frequencies are divided by."""
_LAYER_NAME: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_NAME: Final = re.compile(r"(\w+)\.(weight|bias)")

# config.json key -> GGUF key after "<architecture>."; `required` ones must be there
_REQUIRED: Final = MappingProxyType(
    {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "context_length",
    }
)
_OPTIONAL: Final = MappingProxyType(
    {
        "intermediate_size": "feed_forward_length",
        "moe_intermediate_size": "expert_feed_forward_length",
        "num_experts_per_tok": "expert_used_count",
        "sliding_window": "attention.sliding_window",
    }
)
_LLAMA3: Final = MappingProxyType(  # the only ones that were ever published; checked against the stored factors
    {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
)


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
    if family is None:
        return name
    if match := _LAYER_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        word = family.words.get(part) or _LAYER.get(part)
        return f"model.layers.{layer}.{word}.{kind}" if word else name
    if (match := _TOP_NAME.fullmatch(name)) and match[1] in _TOP:
        return f"{_TOP[match[1]]}.{match[2]}"
    return name


def config_of(
    metadata: Mapping[str, Any], names: frozenset[str], rope_factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """A config.json's content from a file's metadata.

    `names` are the tensors' Hugging Face names; `rope_factors` the values `[head_dim / 2]` of those of `ROPE_FACTORS`
    that the file has.
    Raises CorruptCheckpoint, naming the key, where a listed architecture lacks one or has it of a wrong type.
    """
    family = family_of(metadata)
    if family is None:
        arch = metadata.get("general.architecture")
        return {"model_type": arch, "architectures": [] if arch is None else [arch]}
    words = Words(metadata, str(metadata["general.architecture"]))
    config = _sizes(words) | _experts(words) | _tokens(metadata, words)
    config["model_type"], config["architectures"] = family.model_type, [family.architecture]
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    config["attention_bias"] = any(name.endswith("q_proj.bias") for name in names)
    config["mlp_bias"] = any(name.endswith("up_proj.bias") for name in names)
    if (rotated := words.number("rope.dimension_count")) is not None:
        config["partial_rotary_factor"] = rotated / max(1, config["head_dim"])
    return config | _rope(words, config["head_dim"], rope_factors) | family.more(words, config)


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

    def positive(self, key: str) -> Any:
        value = self.number(key)
        if value is None or value <= 0:
            raise CorruptCheckpoint(f"the GGUF key {self.arch}.{key} is {value}, not > 0; convert the model again")
        return value


def _sizes(words: Words) -> dict[str, Any]:
    config = {key: words.positive(name) for key, name in _REQUIRED.items()}
    config |= {key: value for key, name in _OPTIONAL.items() if (value := words.number(name)) is not None}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = words.number("attention.head_count_kv") or heads
    config["head_dim"] = words.number("attention.key_length") or config["hidden_size"] // heads
    return config


def _experts(words: Words) -> dict[str, Any]:
    count = words.number("expert_count")
    return {"num_experts": count, "num_local_experts": count, "norm_topk_prob": True} if count else {}


def _tokens(metadata: Mapping[str, Any], words: Words) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else words.positive("vocab_size")
    ids = {key: metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")}
    return {"vocab_size": size, **ids}


def _rope(words: Words, head_dim: int, factors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    base = float(words.number("rope.freq_base") or 10000.0)
    original = words.number("rope.scaling.original_context_length")
    stated = {"original_max_position_embeddings": original} if original else {}
    if PLAIN_FACTORS in factors:
        return {"rope_theta": base, "rope_scaling": _rope_from_factors(base, head_dim, factors[PLAIN_FACTORS])}
    if SHORT_FACTORS in factors and LONG_FACTORS in factors:
        lists: dict[str, Any] = {
            "short_factor": list(factors[SHORT_FACTORS]),
            "long_factor": list(factors[LONG_FACTORS]),
        }
        raised = words.number("rope.scaling.attn_factor")
        lists |= {"attention_factor": float(raised)} if raised else {}
        return {"rope_theta": base, "rope_scaling": {"rope_type": "longrope", **lists, **stated}, **stated}
    kind = words.metadata.get(f"{words.arch}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_theta": base, "rope_scaling": None}
    scaling = {"rope_type": kind, "factor": float(words.positive("rope.scaling.factor"))}
    found = {key: words.number(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    scaling |= {key: float(value) for key, value in found.items() if value}
    return {"rope_theta": base, "rope_scaling": scaling | stated}


def _rope_from_factors(base: float, head_dim: int, factors: Sequence[float]) -> dict[str, Any]:
    """Stored per-frequency divisors as "llama3" scaling, if they are that, else as they are."""
    scaling = {"rope_type": "llama3", "factor": float(max(factors)), **_LLAMA3}
    expected = llama3_divisors(base, head_dim, scaling)
    if len(expected) == len(factors) and all(map(_close, expected, factors)):
        return scaling
    return {"rope_type": "divisors", "divisors": [float(factor) for factor in factors]}


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-4)  # the file holds float32 of a float32 computation


def llama3_divisors(base: float, head_dim: int, scaling: Mapping[str, Any]) -> list[float]:
    """What "llama3" scaling divides each of the head_dim / 2 rotary frequencies by (from Llama 3.1's reference code).

    Long wavelengths are divided by `factor`, short ones by 1, those between by a smooth mix.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    wavelengths = [2 * math.pi * base ** (2 * index / head_dim) for index in range(head_dim // 2)]
    mixes = [min(1.0, max(0.0, (original / wave - low) / (high - low))) for wave in wavelengths]
    return [1.0 / ((1.0 - mix) / factor + mix) for mix in mixes]
