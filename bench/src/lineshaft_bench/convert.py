"""Writes a checkpoint as other engines read it: a folder with config.json and safetensors in one dtype."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import save_file

from lineshaft.registry import discover
from lineshaft.weights.checkpoint import FORMATS, open_checkpoint
from lineshaft.weights.decoded import decode_with
from lineshaft.weights.refs import resolve
from lineshaft_contract.schemes import dequantize
from lineshaft_contract.weights import Checkpoint


def folder_for_peers(reference: str, dtype: str, scratch: Path) -> Path:
    """The model's own folder, or, for a GGUF file, one that is written below `scratch`, once. Raises ModelError."""
    registry = discover()
    path = resolve(reference)
    if path.is_dir():
        return path
    folder = scratch / f"{path.stem}-{dtype}"
    if folder.exists():
        return folder
    opened = open_checkpoint(path, (*registry.checkpoints(), *FORMATS))
    return write_folder(decode_with(opened, registry.schemes()), dtype, folder)


def write_folder(checkpoint: Checkpoint, dtype: str, folder: Path) -> Path:
    """Write every tensor in that dtype, under its Hugging Face name."""
    folder.mkdir(parents=True)
    config = {**checkpoint.config, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=list), encoding="utf-8")
    tensors = {}
    for name in sorted(checkpoint.names()):
        stored = checkpoint.rows(name, 0, checkpoint.shape(name)[0])
        tensors[name] = dequantize(stored, dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
