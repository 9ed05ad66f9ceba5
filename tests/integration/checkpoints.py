"""The random Llamas of these tests by name: odd sizes, and one thing special about each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa1": {"seed": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "gqa3-tied": {
        "seed": 2, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "gqa8": {"seed": 3, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 10},
    "llama3-rope": {
        "seed": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": LLAMA3,
    },
    "linear-rope": {
        "seed": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    },
    "sharded": {
        "seed": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "shards": "60KB",
    },
    "stored-bfloat16": {
        "seed": 7, "num_attention_heads": 6, "num_key_value_heads": 6, "store": torch.bfloat16,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    },
    "even": {  # what tp = 2 and dp x tp can cut; 131 entries of vocabulary they cannot, which pads
        "seed": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 96,
    },
    "eight": {  # what eight ranks can share
        "seed": 12, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8, "hidden_size": 64,
        "intermediate_size": 96,
    },
    "lanes": {  # sizes that fill whole lanes of a tile
        "seed": 13, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 128,
        "intermediate_size": 128,
    },
    "lone-kv": {  # fewer kv heads than workers
        "seed": 9, "num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 64, "intermediate_size": 96,
    },
}  # fmt: skip

YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 24,
    "beta_fast": 4.0,
}  # fmt: skip
BLENDED: dict[str, Any] = YARN | {"rope_theta": 500.0, "original_max_position_embeddings": 128}
"""Some of the few pairs of a small head lie between those that stay and those that are divided."""
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.25, 1.5],
    "long_factor": [1.0, 1.5, 4.0, 9.0],
}  # fmt: skip
BY_LAYER: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
EVEN: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
"""What tp = 2 can cut."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-biases": {
        "seed": 20, "num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
    },
    "llama-yarn": {"seed": 21, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": BLENDED},
    "mistral": {
        "seed": 22, "model_type": "mistral", "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 9,
    },
    "mistral-no-window": {
        "seed": 23, "model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": None,
        "head_dim": 10,
    },
    "qwen2": {"seed": 24, "model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen2-window": {
        "seed": 25, "model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 6,
        "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True,
    },
    "qwen3": {
        "seed": 26, "model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20,
        "tie_word_embeddings": True,
    },
    "qwen3-biases": {
        "seed": 27, "model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "attention_bias": True,
    },
    "gemma3": {
        "seed": 28, "model_type": "gemma3_text", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20,
        "sliding_window": 8, "query_pre_attn_scalar": 30, "num_hidden_layers": 4, "sliding_window_pattern": 3,
        "rope_parameters": BY_LAYER,
    },
    "gemma3-gguf": {  # what files of that format do not say is as in the published models
        "seed": 36, "model_type": "gemma3_text", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20,
        "sliding_window": 8, "query_pre_attn_scalar": 20, "num_hidden_layers": 7, "rope_parameters": BY_LAYER,
    },
    "gemma3-untied": {
        "seed": 29, "model_type": "gemma3_text", "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "sliding_window": 5, "tie_word_embeddings": False, "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "phi3": {
        "seed": 30, "model_type": "phi3", "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 11,
    },
    "phi3-longrope": {
        "seed": 31, "model_type": "phi3", "num_attention_heads": 6, "num_key_value_heads": 3,
        "rope_parameters": LONGROPE, "partial_rotary_factor": 0.67, "original_max_position_embeddings": 8,
    },
    "even-qwen2": {"seed": 32, "model_type": "qwen2", **EVEN},
    "even-qwen3": {"seed": 33, "model_type": "qwen3", "attention_bias": True, **EVEN},
    "even-gemma3": {"seed": 34, "model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2, **EVEN},
    "even-phi3": {"seed": 35, "model_type": "phi3", **EVEN},
}  # fmt: skip

FEW: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **FEW, "seed": 41, "model_type": "mixtral", "intermediate_size": 40, "num_local_experts": 5,
        "num_experts_per_tok": 2, "sliding_window": 9,
    },
    "qwen3-moe": {  # the second layer is dense
        **FEW, "seed": 42, "model_type": "qwen3_moe", "intermediate_size": 100, "moe_intermediate_size": 24,
        "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 20, "norm_topk_prob": True, "mlp_only_layers": [1],
        "attention_bias": True,
    },
    "qwen3-moe-step2": {  # so are the first and the third
        **FEW, "seed": 43, "model_type": "qwen3_moe", "intermediate_size": 36, "moe_intermediate_size": 28,
        "num_experts": 9, "num_experts_per_tok": 4, "head_dim": 16, "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "gpt-oss": {
        **FEW, "seed": 44, "model_type": "gpt_oss", "intermediate_size": 40, "num_local_experts": 5,
        "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9, "swiglu_limit": 0.75,
        "rope_parameters": YARN | {"truncate": False},
    },
    "deepseek-v2": {
        **FEW, "seed": 45, "model_type": "deepseek_v2", "intermediate_size": 100, "moe_intermediate_size": 24,
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.5,
        "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "num_key_value_heads": 4, "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
    },
    "deepseek-v2-lite": {  # queries without a latent, and no group
        **FEW, "seed": 46, "model_type": "deepseek_v2", "intermediate_size": 36, "moe_intermediate_size": 20,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Random models of experts. Two ranks can share each."""

VARIANTS |= FAMILIES | EXPERTS

ODD = ("gqa1", "gqa3-tied", "gqa8", "llama3-rope", "linear-rope", "sharded", "stored-bfloat16")

CHAT: dict[str, Any] = VARIANTS["even"] | {"seed": 10, "vocab_size": 256, "max_position_embeddings": 16384}


def add_tokenizer(folder: Path) -> None:
    """A token for each byte; no special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
