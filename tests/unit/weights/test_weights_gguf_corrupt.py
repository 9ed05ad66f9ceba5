"""A damaged GGUF file gives a typed error at once: never another exception, never a hang."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lineshaft.errors import CorruptCheckpoint, LineshaftError, ModelNotFound
from lineshaft.tokenizer import Tokenizer
from lineshaft.weights.checkpoint import open_checkpoint
from lineshaft.weights.gguf_parse import parse_gguf
from lineshaft_contract.schemes import BLOCKS

LIMIT_S = 20.0  # a bound against hanging, far above what reading takes


@pytest.fixture
def valid(write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> Path:
    path = write_gguf(plain_tensors)
    parse_gguf(path)
    return path


def expect_corrupt(path: Path) -> str:
    start = time.perf_counter()
    with pytest.raises(CorruptCheckpoint) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - start < LIMIT_S
    message = str(caught.value)
    assert path.name in message and "\n" not in message
    return message


@pytest.mark.parametrize("part", range(8))
def test_cut_anywhere(valid: Path, part: int) -> None:
    content = valid.read_bytes()
    head = len(content) - sum(tensor.data.nbytes for tensor in parse_gguf(valid).tensors.values())
    cuts = [*range(part, head, 8), *range(head + part * 997, len(content), 8 * 997), len(content) - 1 - part]
    for cut in cuts:
        valid.write_bytes(content[:cut])
        expect_corrupt(valid)


@pytest.mark.parametrize("size", [10, 100, 5_000, 300_000, 1_500_000, 2_000_000, 50_000_000, 98_000_000])
def test_the_real_file_cut(smollm2: Path, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2.open("rb") as file:
        path.write_bytes(file.read(min(size, 2_500_000)))
    os.truncate(path, size)
    expect_corrupt(path)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1), value=st.integers(0, 255))
def test_one_wrong_byte_in_the_head_is_at_worst_a_typed_error(valid: Path, place: float, value: int) -> None:
    content = bytearray(valid.read_bytes())
    content[int(place * 2000)] = value
    path = valid.with_name("flipped.gguf")
    path.write_bytes(content)
    start = time.perf_counter()
    with contextlib.suppress(LineshaftError):
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.rows(name, 0, checkpoint.shape(name)[0])
        Tokenizer.from_checkpoint(path)
    assert time.perf_counter() - start < LIMIT_S


def head(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no checkpoint"),
        (b"GGU", "no checkpoint"),
        (b"PK\3\4 not a model", "no checkpoint"),
        (b"GGUF", "ends inside its version"),
        (head(version=1), "version 1"),
        (head(version=3 << 24), "version"),
        (head(tensors=1 << 62), "ends inside the name of tensor 0"),
        (head(pairs=(1 << 64) - 1), "ends inside key 0"),
        (head(pairs=1) + text(b"k") + struct.pack("<I", 99) + b"\0" * 8, "unknown type 99 in k"),
        (head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 8, "array of unknown type 9 in k"),
        (head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60), "ends inside k"),
        (head(pairs=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62), "ends inside k"),
        (head(pairs=1) + text(b"\xff" * 9) + b"\0" * 8, "no UTF-8"),
        (head(tensors=1) + text(b"t") + struct.pack("<I", 1 << 31) + b"\0" * 99, "dims"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 0, 1 << 63, 0, 0) + b"\0" * 99, "without a number"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 4, 77, 0) + b"\0" * 99, "of type 77"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 31, 1, 2, 0) + b"\0" * 99, "q4_0 blocks of 32"),
        (head(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 63) + b"\0" * 99, "past its end"),
        (head(tensors=1) + text(b"t") + struct.pack("<I4QIQ", 4, *[1 << 63] * 4, 0, 0) + b"\0" * 99, "past its end"),
    ],
)
def test_wrong_content(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=words):
        open_checkpoint(path)
    expect_corrupt(path)


@pytest.mark.parametrize("alignment", [0, 3])
def test_a_wrong_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(head(pairs=1) + text(b"general.alignment") + struct.pack("<II", 4, alignment))
    assert "alignment" in expect_corrupt(path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        open_checkpoint(tmp_path / "none.gguf")


def test_a_plugin_format_comes_first(valid: Path) -> None:
    from lineshaft.weights.checkpoint import FORMATS, CheckpointFormat

    opened = open_checkpoint(valid)
    mine = CheckpointFormat("mine", lambda path: path.suffix == ".gguf", lambda path: opened)
    assert open_checkpoint(valid, (mine, *FORMATS)) is opened


def test_block_table_is_that_of_the_gguf_package() -> None:
    for scheme, block in BLOCKS.items():
        kind = gguf.GGMLQuantizationType[scheme.upper()]
        assert gguf.GGML_QUANT_SIZES[kind] == (block.size, block.nbytes)


def test_every_block_scheme_can_be_dequantized() -> None:
    from lineshaft_contract.schemes import dequantize
    from lineshaft_contract.weights import Stored

    for scheme, block in BLOCKS.items():
        data = np.zeros((3, 2 * block.nbytes), np.uint8)
        out = dequantize(Stored(scheme, (3, 2 * block.size), {"data": data}), "bfloat16")
        assert out.shape == (3, 2 * block.size) and out.dtype.name == "bfloat16", scheme
