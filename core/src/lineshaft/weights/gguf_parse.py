"""Parses the head of a GGUF file: its key-value pairs and its tensor table. Every count and offset is checked first.

Owns the binary format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Knows no model and no tokenizer.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from lineshaft.errors import CorruptCheckpoint
from lineshaft.weights.mapped import DTYPES, TensorView, map_file
from lineshaft_contract.schemes import BLOCKS, GGUF_TYPES, PLAIN, as_dtype

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMS: Final = 4


@dataclass(frozen=True)
class GgufFile:
    """A parsed file; `tensors` are under the file's own names, of shape `[out, in]`."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorView]


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
        start, end = self.at, self.at + count
        if end > len(self.buffer):
            raise self.corrupt(f"ends inside {what}: it has {len(self.buffer)} bytes, {end} are needed")
        self.at = end
        return self.buffer[start:end]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def texts(self, count: int, what: str) -> list[str]:
        """In one loop: a vocabulary and its merges have a hundred thousand."""
        buffer, end, length, found = self.buffer, len(self.buffer), struct.Struct("<Q").unpack_from, list[str]()
        try:
            while len(found) < count:
                start = self.at + 8
                if start > end or (stop := start + length(buffer, self.at)[0]) > end:
                    raise self.corrupt(f"ends inside {what}: it has {end} bytes")
                found.append(str(buffer[start:stop], "utf-8"))
                self.at = stop
        except UnicodeDecodeError as error:
            raise self.corrupt(f"has text that is no UTF-8 in {what}") from error
        return found

    def corrupt(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.path} {what}; the file is truncated or damaged: download it again")


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    if bytes(cursor.take(4, "its magic bytes")) != MAGIC:
        raise cursor.corrupt("does not begin with GGUF")
    version = cursor.number("I", "its version")
    if version not in _VERSIONS:
        raise CorruptCheckpoint(
            f"{cursor.path} says GGUF version {version}; versions {_VERSIONS}, little-endian, can be read: "
            "convert it, or download it again"
        )
    return cursor.number("Q", "its tensor count"), cursor.number("Q", "its key count")


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.texts(1, f"key {index}")[0]
        metadata[key] = _read_value(cursor, cursor.number("I", key), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], key)
    if kind == _STRING:
        return cursor.texts(1, key)[0]
    if kind == _ARRAY:
        return _read_array(cursor, key)
    raise cursor.corrupt(f"has a value of unknown type {kind} in {key}")


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    kind, count = cursor.number("I", key), cursor.number("Q", key)
    if kind == _STRING:
        return cursor.texts(count, key)
    if kind not in _SCALARS:
        raise cursor.corrupt(f"has an array of unknown type {kind} in {key}")
    dtype = np.dtype(f"<{_SCALARS[kind]}")
    return list(np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype).tolist())


def _read_table(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Name -> (shape `[out, in]`, type, offset into the data)."""
    table = {}
    for index in range(count):
        name = cursor.texts(1, f"the name of tensor {index}")[0]
        dims = cursor.number("I", name)
        if name in table or not 1 <= dims <= _MAX_DIMS:
            raise cursor.corrupt(f"has tensor {name!r} twice, or of {dims} dims")
        shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims, name))[::-1]
        if 0 in shape:
            raise cursor.corrupt(f"has tensor {name!r} of shape {shape}, without a number")
        table[name] = (shape, cursor.number("I", name), cursor.number("Q", name))
    return table


def _align(at: int, alignment: Any, cursor: _Cursor) -> int:
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.corrupt(f"says general.alignment {alignment!r}, which is no power of two")
    return -(-at // alignment) * alignment


def _map_tensor(cursor: _Cursor, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorView:
    scheme, dtype, row = _row_format(cursor, name, shape, kind)
    stored = (*shape[:-1], row)
    size = prod(stored) * dtype.itemsize
    if start + offset + size > len(cursor.buffer):
        raise cursor.corrupt(
            f"has tensor {name} at bytes {start + offset}:{start + offset + size}, past its end at {len(cursor.buffer)}"
        )
    flat = np.frombuffer(cursor.buffer, dtype, prod(stored), start + offset)
    return TensorView(name, scheme, shape, flat.reshape(stored))


def _row_format(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, np.dtype[Any], int]:
    """Scheme, stored dtype, and length of a stored row in items of that dtype."""
    word = GGUF_TYPES[kind] if kind < len(GGUF_TYPES) else str(kind)
    if word in DTYPES:
        return PLAIN, as_dtype(DTYPES[word]), shape[-1]
    scheme = word.lower()
    if scheme not in BLOCKS:
        raise cursor.corrupt(f"has tensor {name} of type {word}, which is none of {sorted(BLOCKS)}")
    if len(shape) < 2 or shape[-1] % BLOCKS[scheme].size:
        raise cursor.corrupt(f"has tensor {name} of shape {shape} in {scheme} blocks of {BLOCKS[scheme].size}")
    return scheme, np.dtype(np.uint8), BLOCKS[scheme].row_bytes(shape[-1])
