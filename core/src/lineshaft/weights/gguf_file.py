"""Opens a GGUF file, or one of several that it is split into, as a checkpoint: tensors as stored, under Hugging Face
names, Llama's q/k rows put back in order and what was added to Gemma's norms taken off.

Joins the binary format (`gguf_parse`) with the words (`gguf_words`); knows no more of either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from lineshaft.errors import CorruptCheckpoint
from lineshaft.weights.gguf_parse import GgufFile, parse_gguf
from lineshaft.weights.gguf_words import ROPE_FACTORS, Family, config_of, family_of, tensor_name
from lineshaft.weights.mapped import MappedCheckpoint, TensorView

_SPLIT: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_PERMUTED: Final = re.compile(r".*\.self_attn\.([qk])_proj\.(?:weight|bias)")


def open_gguf(path: Path) -> MappedCheckpoint:
    """Open a GGUF file, with its siblings if it is split. Heads are checked now, the data is read when it is cut.

    Raises ModelNotFound or CorruptCheckpoint.
    """
    file = _whole(parse_gguf(path))
    family = family_of(file.metadata)
    views = {view.name: view for tensor in file.tensors.values() for view in _views(path, tensor, family)}
    tables = {key: file.tensors[name].data for name, key in ROPE_FACTORS.items() if name in file.tensors}
    factors = {key: data.ravel().astype(np.float64).tolist() for key, data in tables.items()}
    try:
        config = config_of(file.metadata, frozenset(views), factors)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    if family is not None:
        views = {name: _restored(path, view, family, config) for name, view in views.items()}
    return MappedCheckpoint(path, config, views)


def _whole(file: GgufFile) -> GgufFile:
    """`file` itself, or what it and its siblings hold together where it is one of a split model."""
    count = file.metadata.get("split.count", 1)
    if count == 1:
        return file
    match = _SPLIT.fullmatch(file.path.name)
    if match is None or int(match["count"]) != count:
        raise CorruptCheckpoint(
            f"{file.path} is one of {count} files; keep them in one folder, as NAME-00001-of-{count:05}.gguf and so on"
        )
    names = [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    files = [parse_gguf(file.path.with_name(name)) for name in names]
    tensors: dict[str, TensorView] = {}
    for part in files:
        if twice := next((name for name in part.tensors if name in tensors), None):
            raise CorruptCheckpoint(f"{part.path} holds tensor {twice}, as a file before it does; download them again")
        tensors |= part.tensors
    return GgufFile(file.path, files[0].metadata, tensors)


def _views(path: Path, tensor: TensorView, family: Family | None) -> list[TensorView]:
    """The tensor under its Hugging Face name, or one view for each expert of stacked ones."""
    word = tensor_name(tensor.name, family)
    if "{}" not in word:
        return [replace(tensor, name=word)]
    if len(tensor.shape) != 3:
        raise CorruptCheckpoint(f"{path}: tensor {tensor.name} has shape {tensor.shape}, not 3 dims; download it again")
    parts = enumerate(tensor.data)
    return [TensorView(word.format(index), tensor.scheme, tensor.shape[1:], data) for index, data in parts]


def _restored(path: Path, view: TensorView, family: Family, config: Mapping[str, Any]) -> TensorView:
    """A norm's weight less what the file has added to it, q/k rows in Hugging Face order; any other view as it is."""
    if family.norm_offset and view.name.endswith("norm.weight"):
        return replace(view, data=view.data.astype(np.float32) - np.float32(family.norm_offset))
    match = _PERMUTED.fullmatch(view.name) if family.permuted else None
    if match is None:
        return view
    heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
    if view.shape[0] % (2 * heads):
        raise CorruptCheckpoint(
            f"{path}: tensor {view.name} has {view.shape[0]} rows, not an even number for each of {heads} heads"
        )
    return replace(view, order=stored_rows(view.shape[0], heads))


def stored_rows(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """int64 `[rows]`: where GGUF's Llama layout stores each Hugging Face row of q or k.

    Hugging Face rotates the first half of a head against the second; GGUF interleaves the two halves.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
