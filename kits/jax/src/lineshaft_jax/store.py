"""Compiled programs on disk, so that a second start does not compile: one file each, named by what it was made from.

The key covers the program's digest (its calls, kernels and problems), the shapes of all arguments, the mesh, the
versions of JAX, of the compiler and of the runtime, the devices with their features, and the source of the packages
that programs are made of. A file is checked against a checksum of its name and content, and one that cannot be used is
compiled anew. Files are loaded as code: the folder must belong to the user alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jax.experimental import serialize_executable

from lineshaft_contract.errors import InvalidValue
from lineshaft_jax.report import device_facts

log = logging.getLogger(__name__)
CHECKSUM = 32
"""Bytes of the sha256 that a file begins with."""
OWN = re.compile(r"(?P<part>\.)?[0-9a-f]{64}(?(part)\.\d+)")
"""Names of the files that a store writes: a program's, and that of one being written."""
STALE = 3600.0
"""Seconds after which a file that is still being written was left behind by a process that died."""


@dataclass(frozen=True)
class ProgramStore:
    """A folder of compiled programs; `most` bounds its size in bytes, beyond which the oldest files go."""

    folder: Path
    facts: Mapping[str, str]
    most: int = 8 << 30

    def key(self, parts: Iterable[Any]) -> str:
        """The name of a program made from these parts, which JSON can hold."""
        content = json.dumps([sorted(self.facts.items()), list(parts)], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def load(self, key: str, devices: list[Any], adopt: Callable[[Any], tuple[Any, Any]]) -> Any | None:
        """The compiled program on these devices, or None where there is none that can be used. `adopt` takes the note
        that was kept with it and returns the structures of its arguments and results."""
        path = self.folder / key
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): the program is compiled anew", path, error.strerror)
            return None
        kept = content[CHECKSUM:]
        if checksum(key, kept) != content[:CHECKSUM]:
            log.warning("%s is damaged: the program is compiled anew", path)
            return None
        note, _, payload = kept.partition(b"\n")
        try:
            trees = adopt(json.loads(note))
            found = serialize_executable.deserialize_and_load(payload, *trees, devices[0].client, devices)
        except Exception as error:
            log.warning("%s cannot be loaded (%s): the program is compiled anew", path, " ".join(str(error).split()))
            return None
        with suppress(OSError):  # a folder that can only be read, or a file that another process has removed
            os.utime(path)
        return found

    def save(self, key: str, compiled: Any, note: Any) -> None:
        """Keep a compiled program and a note that JSON can hold. One that cannot be kept is compiled again."""
        part = self.folder / f".{key}.{os.getpid()}"
        try:
            payload, *_ = serialize_executable.serialize(compiled)
            kept = json.dumps(note).encode() + b"\n" + payload
            part.write_bytes(checksum(key, kept) + kept)
            part.replace(self.folder / key)
        except Exception as error:
            with suppress(OSError):
                part.unlink()
            log.warning("a compiled program is not kept in %s: %s", self.folder, " ".join(str(error).split()))

    def prune(self) -> None:
        """Remove what processes that died left half written, then the programs that were used longest ago, until the
        rest is within `most` bytes. Only files that a store has written are counted and removed."""
        found = []
        for path, part in self.own_files():
            with suppress(OSError):  # another process is at work here too
                stat = path.stat()
                if part and time.time() - stat.st_mtime > STALE:
                    path.unlink()
                else:
                    found.append((stat, path))
        total = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda pair: pair[0].st_mtime):
            if total <= self.most:
                break
            with suppress(OSError):
                path.unlink()
                total -= stat.st_size

    def own_files(self) -> Iterator[tuple[Path, bool]]:
        """The files that a store has written to the folder, and of each whether it is half written."""
        for path in self.folder.iterdir():
            name = OWN.fullmatch(path.name)
            if name and path.is_file():
                yield path, name["part"] is not None


def checksum(key: str, kept: bytes) -> bytes:
    """What the file of the program of this key begins with; another program's content does not fit it."""
    return hashlib.sha256(key.encode() + b"\0" + kept).digest()


def find_store(
    cache_dir: str, devices: list[Any], packages: Iterable[str], variables: Iterable[str] = ("XLA_FLAGS",)
) -> ProgramStore | None:
    """The store that a user's `cache_dir` names: a folder, or "auto" for the default one; None for "off".

    Its programs depend on the devices, on the source of `packages` and on the values of environment `variables`.
    Raises InvalidValue for a folder that cannot be used.
    """
    if cache_dir == "off":
        return None
    try:
        folder = default_folder(os.environ) if cache_dir == "auto" else Path(cache_dir).expanduser()
    except RuntimeError as error:
        raise InvalidValue(f"cache_dir = {cache_dir!r}: no home folder is known; name another or 'off'") from error
    values = {name: os.environ.get(name, "") for name in variables}
    return open_store(folder, {**device_facts(devices), **values, "source": source_digest(packages)})


def open_store(folder: Path, facts: Mapping[str, str]) -> ProgramStore:
    """The store in a folder, made for this user alone. Raises InvalidValue for one that others may write to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        next(folder.iterdir(), None)
    except (OSError, ValueError) as error:
        said = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InvalidValue(f"cache_dir = {str(folder)!r} cannot be used ({said}); name another or 'off'") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InvalidValue(
            f"cache_dir = {str(folder)!r}: others may write to it, and compiled programs are run as they are; "
            "name a folder that is yours alone, or 'off'"
        )
    store = ProgramStore(folder, facts)
    store.prune()
    return store


def default_folder(environment: Mapping[str, str]) -> Path:
    """Where compiled programs are kept unless the user says otherwise (XDG base directories)."""
    base = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lineshaft" / "programs"


def source_digest(packages: Iterable[str]) -> str:
    """sha256 of the source of packages: a program is as good as the code that traced it."""
    total = hashlib.sha256()
    for name in sorted(packages):
        spec = find_spec(name)
        for root in spec.submodule_search_locations or () if spec else ():
            for path in sorted(Path(root).rglob("*.py")):
                total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
