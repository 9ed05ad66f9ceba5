"""Compiles `native/` to `_native.so` when lineshaft-cpu is installed; without a compiler, `_native.txt` says why not.

hatchling runs it for wheels and editable installs. It knows nothing of what the kernels compute.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

_BF16 = ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"]
LEVELS = {
    "amx": [*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    "avx512_bf16": _BF16,
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
    "amx_emulated": ["-DLINESHAFT_EMULATE_TILES"],
}
"""Flags by level, best first; "portable" is the one that every machine has and that must compile, "amx_emulated" the
code for tiles with their primitives in plain C."""
SOURCES = ("kernels.c", "bounds.c")
"""Compiled for every level."""
SHARED = ("support", "team", "pack", "inputs")
"""Sources that are compiled once, without any level's flags and with every product rounded before it is added to."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fPIC", "-fvisibility=hidden"]
FIX = "have a C compiler, e.g. `apt install gcc`, and install lineshaft-cpu again with `pip install --force-reinstall`"


class BuildFailed(Exception):
    """Why something was not compiled, in one line."""


class NativeBuildHook(BuildHookInterface[Any]):
    """Puts the library, or the reason that there is none, into the package; with a library the wheel has a platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root, "src", "lineshaft_cpu")
        notes = build(Path(self.root, "native"), package)
        built = (package / "_native.so").exists()
        if notes:
            what = "not all native kernels were compiled" if built else "lineshaft-cpu gets no native kernels"
            self.app.display_warning(f"{what}: {'; '.join(notes)}; to get them, {FIX}")
        build_data["artifacts"] += ["src/lineshaft_cpu/_native.so", "src/lineshaft_cpu/_native.txt"]
        if built and version == "standard":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{machine_tag()}"


def machine_tag() -> str:
    """The platform tag of this machine alone: what is compiled here claims no older system's libraries."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))


def build(native: Path, package: Path) -> list[str]:
    """Make `_native.so` in `package` of the sources in `native`.

    Returns what `_native.txt` then says, which is absent where there is nothing to say: a line "level: reason" for each
    level that was left out, or the one reason why there is no library.
    """
    library, text = package / "_native.so", package / "_native.txt"
    library.unlink(missing_ok=True)
    text.unlink(missing_ok=True)
    try:
        with TemporaryDirectory(prefix="_native.", dir=package) as folder:  # on the file system it is moved within
            notes = make(compiler(), native, Path(folder))
            os.replace(Path(folder, library.name), library)
    except BuildFailed as error:
        notes = [str(error)]
    if notes:
        text.write_text("".join(f"{note}\n" for note in notes), encoding="utf-8")
    return notes


def compiler() -> list[str]:
    """The command that `CC` names, or the first compiler on the path."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise BuildFailed(f"no C compiler was found ({', '.join(COMPILERS)})")
    return [found]


def make(cc: list[str], native: Path, folder: Path) -> list[str]:
    """Compile every level, link them to `folder/_native.so`, and return "level: reason" for those left out."""
    levels = list(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ["portable", "amx_emulated"]

    def attempt(level: str) -> str | None:
        try:
            for name, source in objects(level).items():
                run([*cc, *FLAGS, *LEVELS[level], "-I.", f"-DLEVEL={level}", "-c", source, "-o", at(name)], native)
        except BuildFailed as error:
            return str(error)
        return None

    def at(name: str) -> str:
        return str(folder / f"{name}.o")

    def objects(level: str) -> dict[str, str]:
        return {f"{level}.{source}": source for source in SOURCES}

    with ThreadPoolExecutor() as pool:
        failed = {level: why for level, why in zip(levels, pool.map(attempt, levels), strict=True) if why}
    if "portable" in failed:
        raise BuildFailed(failed["portable"])
    made = [level for level in levels if level not in failed]
    for name in SHARED:
        exact = [*FLAGS, "-ffp-contract=off", "-I."]
        run([*cc, *exact, f'-DLEVELS="{" ".join(made)}"', "-c", f"{name}.c", "-o", at(name)], native)
    linked = [*(name for level in made for name in objects(level)), *SHARED]
    run([*cc, "-shared", "-pthread", *map(at, linked), "-lm", "-o", str(folder / "_native.so")], native)
    return [f"{level}: {why}" for level, why in failed.items()]


def run(command: list[str], folder: Path) -> None:
    """Run a compiler in `folder`; BuildFailed with its first error if it fails."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildFailed(f"{name} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line] or lines or [f"exit status {done.returncode}, no message"]
        raise BuildFailed(f"{name} failed: {errors[0]}")
