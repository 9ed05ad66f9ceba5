"""Parses the head of a GGUF file: its key-value pairs and its tensor table. Every count and offset is checked first.

Owns the binary format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Knows no model and no tokenizer.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from lineshaft.errors import CorruptCheckpoint
from lineshaft.weights.mapped import map_file
from lineshaft_contract.schemes import BLOCKS, PLAIN, as_dtype

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS: Final = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
_PLAIN_TYPES: Final = MappingProxyType(
    {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
)
_BLOCK_TYPES: Final = MappingProxyType(
    {
        2: "q4_0",
        3: "q4_1",
        6: "q5_0",
        7: "q5_1",
        8: "q8_0",
        10: "q2_k",
        11: "q3_k",
        12: "q4_k",
        13: "q5_k",
        14: "q6_k",
        16: "iq2_xxs",
        17: "iq2_xs",
        18: "iq3_xxs",
        19: "iq1_s",
        20: "iq4_nl",
        21: "iq3_s",
        22: "iq2_s",
        23: "iq4_xs",
        29: "iq1_m",
        34: "tq1_0",
        35: "tq2_0",
        39: "mxfp4",
    }
)
_MIN_PAIR, _MIN_TENSOR = 13, 24  # bytes: empty name, smallest value; empty name, no dims
_MAX_DIMS: Final = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the file has it: `shape` is `[out, in]`, `data` a view (uint8 `[..., bytes per row]` in blocks)."""

    scheme: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]


@dataclass(frozen=True)
class GgufFile:
    """A parsed file; `tensors` are under the file's own names."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins with the GGUF magic bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def parse_gguf(path: Path) -> GgufFile:
    """Parse the whole head of `path`. Raises CorruptCheckpoint unless every tensor lies inside the file."""
    cursor = _Cursor(path, map_file(path))
    tensor_count, pair_count = _read_start(cursor)
    metadata = _read_pairs(cursor, pair_count)
    entries = _read_table(cursor, tensor_count)
    start = _align(cursor.at, metadata.get("general.alignment", 32), cursor)
    tensors = {name: _map_tensor(cursor, start, name, *entry) for name, entry in entries.items()}
    return GgufFile(path, metadata, tensors)


class _Cursor:
    """A place in the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path = path
        self.buffer = buffer
        self.at = 0

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.buffer) - self.at:
            raise self.corrupt(f"ends inside {what}: it has {len(self.buffer)} bytes, {self.at + count} are needed")
        self.at += count
        return self.buffer[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("<Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"has text that is no UTF-8 in {what}") from error

    def check_count(self, count: int, least: int, what: str) -> int:
        """`count` items of at least `least` bytes each must fit into the rest of the file."""
        if count * least > len(self.buffer) - self.at:
            raise self.corrupt(f"claims {count} items of {what}, more than its {len(self.buffer)} bytes can hold")
        return count

    def corrupt(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.path} {what}; the file is truncated or damaged: download it again")


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    if bytes(cursor.take(4, "its magic bytes")) != MAGIC:
        raise cursor.corrupt("does not begin with GGUF")
    version = cursor.number("<I", "its version")
    if version not in _VERSIONS:
        raise CorruptCheckpoint(
            f"{cursor.path} says GGUF version {version}; versions {_VERSIONS}, little-endian, can be read: "
            "convert it, or download it again"
        )
    tensors, pairs = cursor.number("<Q", "its tensor count"), cursor.number("<Q", "its key count")
    return cursor.check_count(tensors, _MIN_TENSOR, "tensors"), cursor.check_count(pairs, _MIN_PAIR, "keys")


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.text(f"key {index}")
        metadata[key] = _read_value(cursor, cursor.number("<I", key), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], key)
    if kind == _STRING:
        return cursor.text(key)
    if kind == _ARRAY:
        return _read_array(cursor, key)
    raise cursor.corrupt(f"has a value of unknown type {kind} in {key}")


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    kind, count = cursor.number("<I", key), cursor.number("<Q", key)
    if kind == _STRING:
        cursor.check_count(count, 8, key)
        return [cursor.text(key) for _ in range(count)]
    if kind not in _SCALARS:
        raise cursor.corrupt(f"has an array of unknown type {kind} in {key}")
    dtype = np.dtype(_SCALARS[kind])
    values: list[Any] = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype).tolist()
    return values


def _read_table(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Name -> (shape `[out, in]`, type, offset into the data)."""
    table = {}
    for index in range(count):
        name = cursor.text(f"the name of tensor {index}")
        dims = cursor.number("<I", name)
        if name in table or not 1 <= dims <= _MAX_DIMS:
            raise cursor.corrupt(f"has tensor {name!r} twice, or of {dims} dims")
        shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims, name))[::-1]
        if 0 in shape:
            raise cursor.corrupt(f"has tensor {name!r} of shape {shape}, without a number")
        table[name] = (shape, cursor.number("<I", name), cursor.number("<Q", name))
    return table


def _align(at: int, alignment: Any, cursor: _Cursor) -> int:
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.corrupt(f"says general.alignment {alignment!r}, which is no power of two")
    return -(-at // alignment) * alignment


def _map_tensor(cursor: _Cursor, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    scheme, dtype, row = _row_format(cursor, name, shape, kind)
    stored = (*shape[:-1], row)
    size = prod(stored) * dtype.itemsize
    if start + offset + size > len(cursor.buffer):
        raise cursor.corrupt(
            f"has tensor {name} at bytes {start + offset}:{start + offset + size}, past its end at {len(cursor.buffer)}"
        )
    flat = np.frombuffer(cursor.buffer, dtype, prod(stored), start + offset)
    return GgufTensor(scheme, shape, flat.reshape(stored))


def _row_format(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, np.dtype[Any], int]:
    """Scheme, stored dtype, and length of a stored row in items of that dtype."""
    if kind in _PLAIN_TYPES:
        return PLAIN, as_dtype(_PLAIN_TYPES[kind]), shape[-1]
    if kind not in _BLOCK_TYPES:
        raise cursor.corrupt(f"has tensor {name} of type {kind}, which is none of {sorted(BLOCKS)}")
    scheme = _BLOCK_TYPES[kind]
    if len(shape) < 2 or shape[-1] % BLOCKS[scheme].size:
        raise cursor.corrupt(f"has tensor {name} of shape {shape} in {scheme} blocks of {BLOCKS[scheme].size}")
    return scheme, np.dtype(np.uint8), BLOCKS[scheme].row_bytes(shape[-1])
