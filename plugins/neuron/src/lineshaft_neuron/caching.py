"""The vendor's cache of compiled programs: where it lies, the compiler's flags, and which programs it already had.
Knows files and variables, and nothing of torch."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lineshaft_contract.backends import switched_on
from lineshaft_contract.errors import InvalidValue
from lineshaft_neuron.options import NeuronOptions

FLAGS = "NEURON_CC_FLAGS"
XLA_FOLDER = "NEURON_COMPILE_CACHE_URL"
FOLDERS = ("TORCH_NEURONX_NEFF_CACHE_DIR", "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR", "TORCH_NEURONX_HLO_CACHE_DIR")
"""Of torch-neuronx with a device: its programs, the locks for them, and what they were lowered to. All in one folder
unless the user says otherwise."""
DISABLED = ("TORCH_NEURONX_NEFF_DISABLE_CACHE", "TORCH_NEURONX_DISABLE_NEFF_CACHE")
"""Its switch, as its source and as its documentation spell it."""
SWITCHES = ("--no_cache", "--retry_failed_compilation")
WRAPPER_FLAGS = (*SWITCHES, "--cache_dir", "--log_level")
"""Of NEURON_CC_FLAGS, those for the wrapper that looks up the cache; the compiler itself does not know them."""
PROGRAM = ".neff"


@dataclass
class Lookup:
    """Whether a program was in the cache; told once it is compiled."""

    hit: bool = False


@dataclass
class CompileCache:
    """One folder of compiled programs. `said` tells where it is and who chose it; `folder` is None where there is none,
    or one that cannot be looked into."""

    folder: Path | None
    said: str
    hits: int = field(default=0, init=False)
    misses: int = field(default=0, init=False)

    @contextmanager
    def counted(self) -> Iterator[Lookup]:
        """Compile within: afterwards the lookup's `hit` is set and counted.

        A hit: the folder had programs, and no program came to it meanwhile. So a program that another process compiles
        into the same folder at that time makes a miss of what might be a hit, and never the reverse. What compiles in
        the background has to be waited for within. An error is not counted.
        """
        before, lookup = self.programs(), Lookup()
        yield lookup
        lookup.hit = bool(before) and self.programs() <= before
        self.hits += lookup.hit
        self.misses += not lookup.hit

    def programs(self) -> frozenset[tuple[str, int]]:
        """The compiled programs, each by its path and inode: one that is replaced is another. Both layouts of the
        vendor end in files *.neff; an empty one is a compilation that failed."""
        found = set()
        for place, _, names in os.walk(self.folder) if self.folder else ():
            for name in names:
                if name.endswith(PROGRAM):
                    path = os.path.join(place, name)
                    try:
                        stat = os.stat(path)
                    except OSError:  # another process has just replaced or removed it
                        continue
                    if stat.st_size:
                        found.add((path, stat.st_ino))
        return frozenset(found)


@dataclass(frozen=True)
class Setup:
    """What the options and the user's environment come to: a cache, and the variables to set before the package is
    imported. `flags` are those of the compiler, without the wrapper's."""

    cache: CompileCache
    variables: Mapping[str, str]
    flags: tuple[str, ...]


def set_up(options: NeuronOptions, lane: str, environment: Mapping[str, str]) -> Setup:
    """The cache of a lane. The user's own variables win over `cache_dir`; the flags of the options come before theirs.

    Raises InvalidValue for a folder that cannot be written to, and for flags that cannot be read.
    """
    flags = merged_flags(options.compiler_flags, environment.get(FLAGS, ""))
    own = compilers_own(flags)
    name, value = _place(options.cache_dir, flags, lane, environment)
    variables: dict[str, str] = {}
    if not value:
        cache = CompileCache(None, f"off: {name}")
        variables = dict.fromkeys(DISABLED, "1") if lane == "compile" else {}
        flags = flags if "--no_cache" in flags else [*flags, "--no_cache"]
    elif "://" in value:
        if lane == "compile":
            raise InvalidValue(f"{name} = {value!r}: the lane compile keeps its programs in a folder; name one")
        cache = CompileCache(None, f"{value}: {name}; not a folder, so that no hit is counted")
    else:
        folder = writable(name, value)
        cache = CompileCache(folder, f"{folder}: {name}")
        variables = _variables(folder, lane, environment)
    variables[FLAGS] = shlex.join(own if lane == "compile" else flags)
    return Setup(cache, variables, tuple(own))


def merged_flags(own: str, users: str) -> list[str]:
    """The flags of the options, then the user's. Raises InvalidValue for those that cannot be split into words."""
    flags = []
    for name, text in (("compiler_flags", own), (FLAGS, users)):
        try:
            flags += shlex.split(text)
        except ValueError as error:
            raise InvalidValue(
                f"{name} = {text!r} cannot be read ({error}); write flags separated by spaces"
            ) from error
    return flags


def compilers_own(flags: Sequence[str]) -> list[str]:
    """The flags without those for the wrapper, and without the words that those take."""
    kept, skipped = [], False
    for flag in flags:
        name, equals, _ = flag.partition("=")
        taken, skipped = skipped, name in WRAPPER_FLAGS and not equals and name not in SWITCHES
        if not taken and name not in WRAPPER_FLAGS:
            kept.append(flag)
    return kept


def writable(name: str, value: str) -> Path:
    """The folder, made if need be. Raises InvalidValue, which tells what named it, if nothing can be written there."""
    try:
        folder = Path(value).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError, RuntimeError) as error:
        said = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InvalidValue(f"{name} = {value!r} cannot be written to ({said}); name another folder, or none") from error
    return folder


def default_folder(environment: Mapping[str, str]) -> str:
    """Where compiled programs are kept unless the user says otherwise (XDG base directories)."""
    return os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "lineshaft", "neuron")


def _place(cache_dir: str, flags: Sequence[str], lane: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """What has chosen the cache, and where it is to be, "" for none: the variables of the lane "compile" first, then
    the flags, as in the vendor's wrapper, then its variable, and what the options say last."""
    if lane == "compile":
        for name in DISABLED:
            if switched_on(environment.get(name)):
                return name, ""
        if environment.get(FOLDERS[0]):
            return FOLDERS[0], environment[FOLDERS[0]]
    if "--no_cache" in flags:
        return f"{FLAGS} --no_cache", ""
    folders = [
        value if equals else after
        for flag, after in zip(flags, [*flags, ""][1:], strict=True)
        for name, equals, value in [flag.partition("=")]
        if name == "--cache_dir"
    ]
    if folders:
        if not folders[-1] or folders[-1].startswith("-"):
            raise InvalidValue(f"{FLAGS}: --cache_dir names no folder; write --cache_dir=FOLDER, or --no_cache")
        return f"{FLAGS} --cache_dir", folders[-1]
    if environment.get(XLA_FOLDER):
        return XLA_FOLDER, environment[XLA_FOLDER]
    return "cache_dir", {"auto": default_folder(environment), "off": ""}.get(cache_dir, cache_dir)


def _variables(folder: Path, lane: str, environment: Mapping[str, str]) -> dict[str, str]:
    if lane != "compile":
        return {XLA_FOLDER: str(folder)}
    return {FOLDERS[0]: str(folder)} | {name: environment.get(name) or str(folder) for name in FOLDERS[1:]}
