"""Seeded random models of every architecture that core has, small enough for any machine, as checkpoints on disk.

Weights are rounded to bfloat16, so that every executed dtype loads the same values and rounding them is no error.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lineshaft_conformance.subject import Subject

Shapes = dict[str, tuple[int, ...]]

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
    return checkpoint(subject, f"tiny model {name}", TINY[name], seed)


def checkpoint(subject: Subject, key: str, config: Mapping[str, Any], seed: int) -> Path:
    """The folder of a model with this config; `key` names it among all that a subject keeps."""
    kept: Checkpoint = subject.keep((key, seed), lambda: write(config, seed))
    return kept.path


def write(config: Mapping[str, Any], seed: int) -> Checkpoint:
    """A checkpoint with random weights. Raises KeyError for an architecture whose tensors are not known here."""
    made = Checkpoint(tempfile.TemporaryDirectory(prefix="lineshaft-tiny-"))
    rng = np.random.default_rng([seed, 4])
    shapes = TENSORS[config["model_type"]](config)
    (made.path / "config.json").write_text(json.dumps(config))
    save_file({name: values(rng, shape) for name, shape in shapes.items()}, made.path / "model.safetensors")
    return made


def values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Norm weights near 1; matrices that keep the size of what they multiply."""
    drawn = rng.standard_normal(shape, np.float32)
    kept = 1 + drawn / 8 if len(shape) == 1 else drawn * np.float32(shape[-1] ** -0.5)
    return kept.astype(ml_dtypes.bfloat16).astype(np.float32)


def llama_tensors(config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every tensor of a Llama checkpoint."""
    hidden, width, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (n, hidden) for name, n in (("q", q), ("k", kv), ("v", kv))}
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, q)
        shapes |= {f"{at}mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, width)
    return shapes


TENSORS = {"llama": llama_tensors}
"""The tensors of a checkpoint by `model_type`."""
