"""Safetensors folders: the same numbers as the safetensors library, as views, and typed errors for wrong files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lineshaft.errors import CorruptCheckpoint, LineshaftError, MisshapenTensor, MissingTensor, ModelNotFound
from lineshaft.weights.checkpoint import open_checkpoint
from lineshaft_contract.weights import Checkpoint


def write_raw(folder: Path, header: Any, data: bytes = b"\0" * 64) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def entry(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_shards_hold_what_was_written(sharded_folder: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = sharded_folder
    checkpoint: Checkpoint = open_checkpoint(folder)
    assert checkpoint.names() == set(tensors)
    for name, expected in tensors.items():
        assert checkpoint.shape(name) == expected.shape
        assert checkpoint.stored_bytes(name) == expected.nbytes
        if expected.ndim:
            data = checkpoint.rows(name, 0, len(expected)).arrays["data"]
            assert data.dtype == expected.dtype
            np.testing.assert_array_equal(data, expected)


def test_agrees_with_the_safetensors_library(sharded_folder: tuple[Path, dict[str, Any]]) -> None:
    torch = pytest.importorskip("torch")
    folder, _ = sharded_folder
    checkpoint = open_checkpoint(folder)
    with safe_open(folder / "model-00001-of-00002.safetensors", "pt") as file:
        theirs = file.get_tensor("a.weight")
    ours = checkpoint.rows("a.weight", 0, 6).arrays["data"]
    np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(torch.uint16).numpy())


def test_cuts_are_views_of_the_mapped_file(sharded_folder: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = sharded_folder
    checkpoint = open_checkpoint(folder)
    rows, cols = checkpoint.rows("a.weight", 2, 5), checkpoint.cols("a.weight", 4, 8)
    assert rows.shape == (3, 8) and cols.shape == (6, 4)
    np.testing.assert_array_equal(rows.arrays["data"], tensors["a.weight"][2:5])
    np.testing.assert_array_equal(cols.arrays["data"], tensors["a.weight"][:, 4:])
    assert np.shares_memory(rows.arrays["data"], checkpoint.rows("a.weight", 0, 6).arrays["data"])
    assert not rows.arrays["data"].flags.owndata and not rows.arrays["data"].flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (3, 2)])
def test_a_cut_outside_the_tensor_is_refused(
    sharded_folder: tuple[Path, dict[str, Any]], start: int, stop: int
) -> None:
    with pytest.raises(MisshapenTensor, match=r"a\.weight"):
        open_checkpoint(sharded_folder[0]).rows("a.weight", start, stop)


def test_a_missing_tensor_is_named_with_its_neighbours(sharded_folder: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(MissingTensor, match=r"no tensor a\.wieght; the nearest names are a\.weight"):
        open_checkpoint(sharded_folder[0]).shape("a.wieght")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[" * 100_000,
        b"[]",
        b"\xff\xfe{}",
        {"w": 3},
        {"w": {"dtype": "F32"}},
        entry(dtype="F5"),
        entry(dtype=["F32"]),
        entry(shape=(4, -4)),
        entry(shape=(4.0, 4)),
        entry(shape=3),
        entry(offsets=(0, 128)),
        entry(offsets=(64, 0)),
        entry(offsets=(0, "x")),
        entry(shape=(4, 5)),
        entry(shape=(1 << 62, 1 << 62)),
        entry(offsets=(4, 68)),
        entry() | {"v": {"dtype": "F32", "shape": (4, 4), "data_offsets": (0, 64)}},
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Any) -> None:
    folder = write_raw(tmp_path / "m", header)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: .*header.*download it again") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1 << 62, 0), (0,) * 100])
def test_a_shape_that_no_array_can_have_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = write_raw(tmp_path / "m", entry(shape=shape, offsets=(0, 0)), b"")
    with pytest.raises(CorruptCheckpoint, match="tensor w has the impossible shape"):
        open_checkpoint(folder)


def test_a_dtype_without_arrays_is_refused(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "m", entry(dtype="C64", shape=(4, 2)))
    with pytest.raises(CorruptCheckpoint, match=r"tensor w has dtype 'C64', not one of F16, .*; convert|header"):
        open_checkpoint(folder)


def test_an_empty_tensor_is_legal(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "m", entry(shape=(0, 4), offsets=(0, 0)), b"")
    assert open_checkpoint(folder).rows("w", 0, 0).arrays["data"].shape == (0, 4)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "m", {})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CorruptCheckpoint, match="header"):
        open_checkpoint(folder)


@pytest.mark.parametrize("share", [0, 1, 7, 8, 9, 50, 99, 150, 160])
def test_a_shard_cut_anywhere_is_refused(sharded_folder: tuple[Path, dict[str, Any]], share: int) -> None:
    folder, _ = sharded_folder
    shard = folder / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    assert share < len(content)
    shard.write_bytes(content[:share])
    with pytest.raises(CorruptCheckpoint, match="00001-of-00002"):
        open_checkpoint(folder)


def test_the_last_byte_counts(sharded_folder: tuple[Path, dict[str, Any]]) -> None:
    shard = sharded_folder[0] / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint):
        open_checkpoint(sharded_folder[0])


@pytest.mark.parametrize(
    ("weight_map", "kind", "words"),
    [
        ({"x": "absent.safetensors"}, CorruptCheckpoint, "tensor x into 'absent.safetensors'"),
        ({"x": "../model.safetensors"}, CorruptCheckpoint, "no file of that folder"),
        ({"x": "x" * 5000}, CorruptCheckpoint, "no file of that folder"),
        ({"x": "model-00001-of-00002.safetensors"}, MissingTensor, "00001-of-00002.safetensors lacks tensor x"),
        ({"x": 3}, CorruptCheckpoint, "no weight_map"),
        ([], CorruptCheckpoint, "no weight_map"),
    ],
)
def test_a_wrong_index_is_refused(
    sharded_folder: tuple[Path, dict[str, Any]], weight_map: Any, kind: type[LineshaftError], words: str
) -> None:
    folder, tensors = sharded_folder
    save_file({"x": tensors["b.weight"]}, folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(kind, match=words):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(sharded_folder: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = sharded_folder
    save_file({"b.weight": tensors["b.weight"], "a.weight": tensors["a.weight"]}, folder / "more.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | {"b.weight": "more.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match=r"more\.safetensors holds tensor [ab]\.weight, and so does model-0000"):
        open_checkpoint(folder)


def test_a_tensor_twice_in_an_index_or_a_header_is_refused(sharded_folder: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = sharded_folder
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {"a.weight": "x", '))
    with pytest.raises(CorruptCheckpoint, match=r"index\.json .*'a\.weight' stands twice"):
        open_checkpoint(folder)
    single = write_raw(folder.parent / "single", entry())
    content = (single / "model.safetensors").read_bytes()[8:]
    header = content[: content.rindex(b"}") + 1]
    twice = header[:-1] + b"," + header[1:]
    (single / "model.safetensors").write_bytes(struct.pack("<Q", len(twice)) + twice + content[len(header) :])
    with pytest.raises(CorruptCheckpoint, match="'w' stands twice"):
        open_checkpoint(single)


@pytest.mark.parametrize("config", ["", "{", "[]", "\x00"])
def test_a_garbage_config_is_refused(sharded_folder: tuple[Path, dict[str, Any]], config: str) -> None:
    (sharded_folder[0] / "config.json").write_text(config)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        open_checkpoint(sharded_folder[0])


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFound, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)
