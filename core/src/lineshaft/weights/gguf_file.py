"""Opens a GGUF file as a checkpoint: tensors as stored, under Hugging Face names, Llama's q/k rows put back in order.

Joins the binary format (`gguf_parse`) with the words (`gguf_words`); knows no more of either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from lineshaft.errors import CorruptCheckpoint
from lineshaft.weights.gguf_parse import GgufFile, GgufTensor, parse_gguf
from lineshaft.weights.gguf_words import Family, config_of, family_of, tensor_name
from lineshaft.weights.mapped import MappedCheckpoint, TensorView

_ROPE_FACTORS: Final = "rope_freqs.weight"
_PERMUTED: Final = re.compile(r".*\.self_attn\.([qk])_proj\.(?:weight|bias)")


def open_gguf(path: Path) -> MappedCheckpoint:
    """Open a GGUF file. The head is checked now, the data is read when it is cut.

    `metadata` is the file's key-value pairs. Raises ModelNotFound or CorruptCheckpoint.
    """
    file = parse_gguf(path)
    family = family_of(file.metadata)
    views = {view.name: view for name, tensor in file.tensors.items() for view in _views(path, name, tensor, family)}
    try:
        config = config_of(file.metadata, frozenset(views), _rope_factors(file))
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    if family is not None and family.permuted:
        views = {name: _unpermuted(path, view, config) for name, view in views.items()}
    return MappedCheckpoint(path, config, views, file.metadata)


def _views(path: Path, name: str, tensor: GgufTensor, family: Family | None) -> list[TensorView]:
    """The tensor under its Hugging Face name, or one view for each expert of stacked ones."""
    word = tensor_name(name, family)
    if "{}" not in word:
        return [TensorView(word, tensor.scheme, tensor.shape, tensor.data)]
    if len(tensor.shape) != 3:
        raise CorruptCheckpoint(f"{path}: tensor {name} has shape {tensor.shape}, not 3 dims; download it again")
    parts = enumerate(tensor.data)
    return [TensorView(word.format(index), tensor.scheme, tensor.shape[1:], data) for index, data in parts]


def _rope_factors(file: GgufFile) -> list[float] | None:
    tensor = file.tensors.get(_ROPE_FACTORS)
    return None if tensor is None else [float(value) for value in tensor.data.ravel()]


def _unpermuted(path: Path, view: TensorView, config: Mapping[str, Any]) -> TensorView:
    """The view with q/k rows in Hugging Face order; any other view as it is."""
    match = _PERMUTED.fullmatch(view.name)
    if match is None:
        return view
    heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
    if view.shape[0] % (2 * heads):
        raise CorruptCheckpoint(
            f"{path}: tensor {view.name} has {view.shape[0]} rows, not an even number for each of {heads} heads"
        )
    return TensorView(view.name, view.scheme, view.shape, view.data, stored_rows(view.shape[0], heads))


def stored_rows(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """int64 `[rows]`: where GGUF's Llama layout stores each Hugging Face row of q or k.

    Hugging Face rotates the first half of a head against the second; GGUF interleaves the two halves.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)
