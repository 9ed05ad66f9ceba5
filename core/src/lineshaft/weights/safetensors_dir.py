"""Reads a Hugging Face folder: config.json and model.safetensors, whole or in shards.

Owns the safetensors header (https://huggingface.co/docs/safetensors) and its checks. Copies no tensor data.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from lineshaft.errors import CorruptCheckpoint, MissingTensor, ModelNotFound
from lineshaft.weights.mapped import MappedCheckpoint, TensorView, map_file
from lineshaft_contract.schemes import PLAIN, as_dtype

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_MAX_HEADER: Final = 100_000_000  # bytes; the format's own limit
_MAX_ELEMENTS: Final = 1 << 56  # more cannot be indexed, even if one dim is 0
_AGAIN: Final = "the file is truncated or damaged: download it again"
_DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }
)


def is_safetensors_dir(path: Path) -> bool:
    """Whether `path` is a folder with a config.json."""
    return path.is_dir() and (path / "config.json").is_file()


def open_safetensors_dir(path: Path) -> MappedCheckpoint:
    """Open the folder `path`. All headers are checked now, the data is read when it is cut.

    Raises ModelNotFound, CorruptCheckpoint, or MissingTensor if the index names a tensor that its shard lacks.
    """
    config = _with_rope_words(read_json(path / "config.json"))
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
    return MappedCheckpoint(path, _with_rope_words(read_json(path / "config.json")), {})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelNotFound or CorruptCheckpoint."""
    try:
        return _as_object(path.read_bytes(), path)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


def read_safetensors(path: Path) -> dict[str, TensorView]:
    """Views of all tensors of one .safetensors file, under their names. Raises CorruptCheckpoint."""
    buffer = map_file(path)
    if len(buffer) < 8:
        raise CorruptCheckpoint(f"{path} has {len(buffer)} bytes, less than a safetensors header; {_AGAIN}")
    (length,) = struct.unpack("<Q", buffer[:8])
    if length > min(len(buffer) - 8, _MAX_HEADER):
        raise CorruptCheckpoint(f"{path} claims a header of {length} bytes but has {len(buffer)} bytes; {_AGAIN}")
    header = _as_object(bytes(buffer[8 : 8 + length]), path)
    shard = _Shard(path, buffer[8 + length :])
    return {name: shard.view(name, entry) for name, entry in header.items() if name != "__metadata__"}


@dataclass(frozen=True)
class _Shard:
    path: Path
    data: memoryview  # what follows the header

    def view(self, name: str, entry: Any) -> TensorView:
        """Check one header entry against the file and map its tensor."""
        dtype, shape, begin, end = self._fields(name, entry)
        count = prod(shape)
        if not 0 <= begin <= end <= len(self.data):
            raise self._corrupt(name, f"lies at bytes {begin}:{end} of {len(self.data)}")
        if count * dtype.itemsize != end - begin:
            raise self._corrupt(name, f"has shape {shape} of {dtype}, which is not {end - begin} bytes")
        flat = np.frombuffer(self.data, dtype, count, begin) if count else np.empty(0, dtype)
        return TensorView(name, PLAIN, shape, flat.reshape(shape))

    def _fields(self, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise self._corrupt(name, "lacks dtype, shape or data_offsets") from error
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or len(shape) > 32:
            raise self._corrupt(name, "has a shape or offset that is no natural number")
        if prod(max(size, 1) for size in shape) >= _MAX_ELEMENTS:
            raise self._corrupt(name, f"has the impossible shape {shape}")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise self._corrupt(name, f"has the unknown dtype {dtype!r} (known: {', '.join(_DTYPES)})")
        return as_dtype(_DTYPES[dtype]), shape, begin, end

    def _corrupt(self, name: str, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.path}: tensor {name} {what}; {_AGAIN}")


def _as_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} holds no valid JSON ({type(error).__name__}: {error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} holds a JSON {type(value).__name__} where an object must be; {_AGAIN}")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} stands twice in one object")
    return found


def _read_shards(folder: Path) -> dict[str, TensorView]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptCheckpoint(f"{folder / _INDEX} has no weight_map from tensor to file; {_AGAIN}")
    shards = {file: read_safetensors(_shard_path(folder, file, weight_map)) for file in sorted({*weight_map.values()})}
    homes: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard:
            if homes.setdefault(name, file) != file:
                raise CorruptCheckpoint(
                    f"{folder / file} holds tensor {name}, and so does {homes[name]}; download the folder again"
                )
    return {name: _in_shard(folder / file, shards[file], name) for name, file in weight_map.items()}


def _shard_path(folder: Path, file: str, weight_map: Mapping[str, str]) -> Path:
    path = folder / file
    if Path(file).name != file or not path.is_file():
        tensor = next(name for name, where in weight_map.items() if where == file)
        raise CorruptCheckpoint(
            f"{folder / _INDEX} puts tensor {tensor} into {file!r}, which is no file of that folder; "
            "download the missing shard"
        )
    return path


def _in_shard(path: Path, shard: Mapping[str, TensorView], name: str) -> TensorView:
    if name not in shard:
        raise MissingTensor(f"{path} lacks tensor {name}, which the index puts there; download the folder again")
    return shard[name]


def _with_rope_words(config: dict[str, Any]) -> dict[str, Any]:
    """Newer config.json files say rope_parameters; say rope_theta and rope_scaling as well, as older ones do."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling} | config
