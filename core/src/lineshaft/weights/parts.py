"""A model file that several Python distributions hold in parts: finds them all and joins them, once, into a cache.

Owns the naming of parts (`NAME.gguf.part00`, `NAME.gguf.part01`, ...). Opens no checkpoint and imports no package.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Final

from lineshaft.errors import ModelNotFound

_PART: Final = re.compile(r".+\.gguf\.part\d+")
_REQUIRED: Final = re.compile(r"[A-Za-z0-9][\w.-]*")


def find_parts(ref: str, distribution: metadata.Distribution) -> list[metadata.PackagePath]:
    """The parts that a distribution and those that it requires hold, in order; none where it holds a model whole.

    Raises ModelNotFound for a part that is missing, with the distribution that is not installed.
    """
    absent, files = [], list(distribution.files or [])
    if any(file.suffix == ".gguf" for file in files):
        return []
    for requirement in distribution.requires or []:
        match = _REQUIRED.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        try:
            files += metadata.distribution(match[0]).files or []
        except metadata.PackageNotFoundError:
            absent.append(match[0])
    found = sorted((file for file in files if _PART.fullmatch(file.name)), key=_number)
    first = _number(found[0]) if found else 0
    whole = [_number(file) for file in found] == list(range(first, first + len(found))) and first <= 1
    if found and (absent or len({file.stem for file in found}) > 1 or not whole):
        have = ", ".join(file.name for file in found)
        wanted = f"; run: pip install {' '.join(absent)}" if absent else "; install all of its parts, of one version"
        raise ModelNotFound(f"model {ref!r} comes in parts, and not all are here ({have}){wanted}")
    return found


def join(parts: list[metadata.PackagePath], cache: Path | None = None) -> Path:
    """The file that the parts make up, in `cache`: what was joined before, or now. Raises ModelNotFound."""
    folder = Path.home() / ".cache" / "lineshaft" / "models" if cache is None else cache
    sources = [Path(str(part.locate())) for part in parts]
    try:
        target = folder / _digest(parts, sources) / parts[0].stem
        if not target.is_file():
            _write(sources, target)
    except OSError as error:
        raise ModelNotFound(
            f"the parts of {parts[0].stem} cannot be joined in {folder}: {error.strerror}; free space there, or join "
            "them elsewhere with `cat` and give that path"
        ) from error
    return target


def _number(file: metadata.PackagePath) -> int:
    return int(file.suffix.removeprefix(".part"))


def _digest(parts: list[metadata.PackagePath], sources: list[Path]) -> str:
    """What tells these parts from others of their names: the installer's hash of each, its size and its time."""
    facts = [
        f"{part.name} {part.hash and part.hash.value} {source.stat().st_size} {source.stat().st_mtime_ns}"
        for part, source in zip(parts, sources, strict=True)
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _write(sources: list[Path], target: Path) -> None:
    """Join in a folder of its own first, so that no other process sees a half."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        whole = Path(scratch, target.name)
        with whole.open("wb") as file:
            for source in sources:
                with source.open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        whole.replace(target)
