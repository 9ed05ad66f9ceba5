"""Reads a Hugging Face folder: config.json and model.safetensors, whole or in shards.

The safetensors library checks the header (https://huggingface.co/docs/safetensors). Copies no tensor data.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from lineshaft.errors import CorruptCheckpoint, MissingTensor, ModelNotFound
from lineshaft.weights.mapped import DTYPES, MappedCheckpoint, TensorView, map_file
from lineshaft_contract.schemes import PLAIN, as_dtype

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_AGAIN: Final = "the file is truncated or damaged: download it again"


def is_safetensors_dir(path: Path) -> bool:
    """Whether `path` is a folder with a config.json."""
    return path.is_dir() and (path / "config.json").is_file()


def open_safetensors_dir(path: Path) -> MappedCheckpoint:
    """Open the folder `path`. All headers are checked now, the data is read when it is cut.

    Raises ModelNotFound, CorruptCheckpoint, or MissingTensor if the index names a tensor that its shard lacks.
    """
    config = read_json(path / "config.json")
    if (path / _SINGLE).is_file():
        return MappedCheckpoint(path, config, read_safetensors(path / _SINGLE))
    if (path / _INDEX).is_file():
        return MappedCheckpoint(path, config, _read_shards(path))
    raise ModelNotFound(
        f"{path} has neither {_SINGLE} nor {_INDEX}; other formats must be converted to safetensors (only "
        "`lineshaft compile` needs no more than config.json)"
    )


def is_config_alone(path: Path) -> bool:
    """Whether `path` is a folder with a config.json and no weights in safetensors."""
    return is_safetensors_dir(path) and not any((path / name).is_file() for name in (_SINGLE, _INDEX))


def open_config_alone(path: Path) -> MappedCheckpoint:
    """The config of the folder `path`, as a checkpoint that has no tensor. Raises ModelNotFound, CorruptCheckpoint."""
    return MappedCheckpoint(path, read_json(path / "config.json"), {})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelNotFound or CorruptCheckpoint."""
    try:
        return _as_object(path.read_bytes(), path)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


def read_safetensors(path: Path) -> dict[str, TensorView]:
    """Views of all tensors of one .safetensors file, under their names. Raises CorruptCheckpoint."""
    buffer = map_file(path)
    try:
        with safe_open(path, framework="numpy"):  # checks that shapes and offsets are sound and cover the whole file
            (length,) = struct.unpack("<Q", buffer[:8])
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path}: {error}; {_AGAIN}") from error
    header = _as_object(bytes(buffer[8 : 8 + length]), path)
    header.pop("__metadata__", None)
    return {name: _view(path, name, buffer[8 + length :], entry) for name, entry in header.items()}


def _view(path: Path, name: str, data: memoryview, entry: dict[str, Any]) -> TensorView:
    """The tensor of a header's entry in `data`, which is what follows the header."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise CorruptCheckpoint(
            f"{path}: tensor {name} has dtype {dtype!r}, not one of {', '.join(DTYPES)}; convert the model"
        )
    try:
        numbers = np.frombuffer(data[begin:end], as_dtype(DTYPES[dtype])).reshape(shape)
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: tensor {name} has the impossible shape {shape}; {_AGAIN}") from error
    return TensorView(name, PLAIN, tuple(shape), numbers)


def _as_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} holds no valid JSON ({type(error).__name__}: {error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} holds a JSON {type(value).__name__} where an object must be; {_AGAIN}")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.80} stands twice in one object")
        found[key] = value
    return found


def _read_shards(folder: Path) -> dict[str, TensorView]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptCheckpoint(f"{folder / _INDEX} has no weight_map from tensor to file; {_AGAIN}")
    shards: dict[str, dict[str, TensorView]] = {}
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name, file in weight_map.items():
        if file not in shards:
            if file not in there:
                raise CorruptCheckpoint(
                    f"{folder / _INDEX} puts tensor {name} into {file!r:.80}, which is no file of that folder; "
                    "download the missing shard"
                )
            shards[file] = read_safetensors(folder / file)
        if name not in shards[file]:
            raise MissingTensor(
                f"{folder / file} lacks tensor {name}, which the index puts there; download the folder again"
            )
    homes: dict[str, str] = {}
    for file, name in sorted((file, name) for file, shard in shards.items() for name in shard):
        if homes.setdefault(name, file) != file:
            raise CorruptCheckpoint(
                f"{folder / file} holds tensor {name}, and so does {homes[name]}; download the folder again"
            )
    return {name: shards[file][name] for name, file in weight_map.items()}
