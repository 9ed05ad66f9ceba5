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

ODD = ("gqa1", "gqa3-tied", "gqa8", "llama3-rope", "linear-rope", "sharded", "stored-bfloat16")

YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "seed": 21, "model_type": "mixtral", "intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 2,
        "sliding_window": 9,
    },
    "qwen3-moe": {  # the second layer is dense
        "seed": 22, "model_type": "qwen3_moe", "intermediate_size": 100, "moe_intermediate_size": 24, "num_experts": 6,
        "num_experts_per_tok": 3, "head_dim": 20, "norm_topk_prob": True, "mlp_only_layers": [1],
        "attention_bias": True,
    },
    "qwen3-moe-step2": {  # so are the first and the third
        "seed": 23, "model_type": "qwen3_moe", "intermediate_size": 36, "moe_intermediate_size": 28, "num_experts": 9,
        "num_experts_per_tok": 4, "head_dim": 16, "decoder_sparse_step": 2, "tie_word_embeddings": True,
    },
    "gpt-oss": {
        "seed": 24, "model_type": "gpt_oss", "intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 2,
        "head_dim": 16, "sliding_window": 9, "swiglu_limit": 0.75, "rope_parameters": YARN | {"truncate": False},
    },
    "deepseek-v2": {
        "seed": 25, "model_type": "deepseek_v2", "intermediate_size": 100, "moe_intermediate_size": 24,
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.5,
        "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
        "num_key_value_heads": 4, "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
    },
    "deepseek-v2-lite": {  # queries without a latent, and no group
        "seed": 26, "model_type": "deepseek_v2", "intermediate_size": 36, "moe_intermediate_size": 20,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Random models of experts. Two ranks can share each."""

CHAT: dict[str, Any] = VARIANTS["even"] | {"seed": 10, "vocab_size": 256, "max_position_embeddings": 16384}


def add_tokenizer(folder: Path) -> None:
    """A token for each byte; no special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
