"""A model that is small enough for a unit test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

ROOT = Path(__file__).parents[3]
HIDDEN, HEADS, KV_HEADS, WIDTH, VOCAB, LAYERS = 32, 4, 2, 48, 256, 2
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The examples run on one thread; other tests get back what they had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a token for each byte, of which 255 ends an output, and a chat template."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": WIDTH, "vocab_size": VOCAB,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "\u00ff"}))
    save_file(tensors(), folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Random weights under their Hugging Face names; the head is not tied to the embedding."""
    rng, kv = np.random.default_rng(0), HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)
    }  # fmt: skip
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes |= {f"model.layers.{i}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{attention}.{name}_proj": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{attention}.{name}_proj": (kv, HIDDEN) for name in "kv"}
        shapes |= {f"{mlp}.{name}_proj": (WIDTH, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{mlp}.down_proj": (HIDDEN, WIDTH)}
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}
