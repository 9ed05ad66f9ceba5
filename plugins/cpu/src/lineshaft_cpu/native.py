"""Loads the C kernels that the install compiled, at the best level that this processor runs; it imports no PyTorch.

A level is one compilation of all kernels for an instruction set; `plugins/cpu/hatch_build.py` says how they are made.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lineshaft_contract.errors import Unsupported

LEVELS = ("amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated")
"""Best first; the last is the code for tiles with their primitives in plain C, for tests."""
AGAIN = "install lineshaft-cpu again (from a checkout: `pip install --force-reinstall --no-deps ./plugins/cpu`)"
FIX = f"to get them, have a C compiler, e.g. `apt install gcc`, and {AGAIN}"
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Native:
    """The kernels of one level."""

    level: str
    library: ctypes.CDLL

    def function(self, name: str, *argtypes: Any) -> Callable[..., Any]:
        """The kernel `name`, which takes `argtypes` and returns nothing; raises `Unsupported` if there is none."""
        found = self._find(f"{self.level}_{name}")
        found.argtypes, found.restype = argtypes, None
        return found

    def shared(self, name: str, returns: Any, *argtypes: Any) -> Callable[..., Any]:
        """The function `name` that all levels have in common; raises `Unsupported` if there is none."""
        found = self._find(name)
        found.argtypes, found.restype = argtypes, returns
        return found

    def address(self, name: str) -> int:
        """The address of the function `name`; raises `Unsupported` if there is none."""
        return int(ctypes.cast(self._find(f"{self.level}_{name}"), ctypes.c_void_p).value or 0)

    def value(self, name: str, kind: Any) -> Any:
        """The constant `name`, of a ctypes type; raises `Unsupported` if there is none."""
        self._find(f"{self.level}_{name}")
        return kind.in_dll(self.library, f"lineshaft_{self.level}_{name}").value

    def _find(self, name: str) -> Any:
        symbol = f"lineshaft_{name}"
        try:
            return self.library[symbol]
        except AttributeError:
            raise Unsupported(f"{self.library._name} has no {symbol}: it is of an earlier build; {AGAIN}") from None


def load(wanted: str = "auto", package: Path = PACKAGE) -> Native:
    """The level `wanted`, or at "auto" the best that was built and that this processor runs; cached.

    `package` is the folder that holds the library. Raises `Unsupported` with what `reason` says, and what to do.
    """
    found = _find(wanted, package)
    if isinstance(found, Refused):
        raise Unsupported("; ".join(part for part in found if part))
    return found


def reason(wanted: str = "auto", package: Path = PACKAGE) -> str | None:
    """Why `load` would refuse, in short, or None if it would not."""
    found = _find(wanted, package)
    return found.why if isinstance(found, Refused) else None


def idle(package: Path = PACKAGE) -> tuple[str, ...]:
    """The levels that were compiled and that this processor does not run, best first."""
    found = _levels(package)
    return () if isinstance(found, str) else tuple(level for level in found.built if level not in found.runs)


class Refused(NamedTuple):
    """Why there are no kernels of a level, and what to do."""

    why: str
    do: str = ""


@cache
def _find(wanted: str, package: Path) -> Native | Refused:
    if wanted == "off":
        return Refused('native kernels are switched off (backend_options native = "off")')
    if wanted not in ("auto", *LEVELS):
        return Refused(f"native = {wanted!r} is not known; allowed are {', '.join(('auto', 'off', *LEVELS))}")
    found = _levels(package)
    if isinstance(found, str):
        return Refused(found, FIX)
    if wanted == "auto":
        return Native(found.runs[0], found.library)
    if wanted not in found.built:
        why = _notes(package) or "it is of other machines"
        built = ", ".join(found.built)
        return Refused(f"native kernels of level {wanted!r} were not built, only {built} ({why})", FIX)
    if wanted not in found.runs:
        return Refused(
            f"this processor does not run native kernels of level {wanted!r}",
            f'it runs {", ".join(found.runs)}; name one of them, or "auto" for the best',
        )
    return Native(wanted, found.library)


@dataclass(frozen=True)
class _Levels:
    """Of a library: what it has and what of it this processor runs, best first."""

    library: ctypes.CDLL
    built: tuple[str, ...]
    runs: tuple[str, ...]


@cache
def _levels(package: Path) -> _Levels | str:
    """What the library of an install has, or why there is none."""
    file, notes = package / "_native.so", _notes(package)
    if not file.exists():
        return f"there are no native kernels: {notes or f'no build has made {file}'}"
    try:
        library = ctypes.CDLL(str(file))
        library.lineshaft_levels.restype = ctypes.c_char_p
        built = tuple(library.lineshaft_levels().decode().split())
        runs = tuple(level for level in LEVELS if level in built and library.lineshaft_supports(level.encode()))
    except (OSError, AttributeError) as error:
        return f"the native kernels cannot be loaded: {error}"
    return _Levels(library, built, runs)


def _notes(package: Path) -> str:
    """What the build wrote down in one line: the levels that it left out, or why there is no library."""
    try:
        return "; ".join((package / "_native.txt").read_text(encoding="utf-8").splitlines())
    except OSError:
        return ""
