"""The options that commands share, and the configuration that they make together with file and environment."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lineshaft.errors import InvalidValue

if TYPE_CHECKING:
    from lineshaft.config import EngineConfig

KEYS = {
    "model": ("REF", "path, hf://ORG/NAME[@REVISION] or pypi:DISTRIBUTION"),
    "backend": ("NAME", "a backend that `lineshaft backends` lists, or auto"),
    "dtype": ("NAME", "dtype to execute: auto, float32, bfloat16, float16 or float64"),
    "threads": ("N", "CPU threads of one worker; 0 = the backend's choice"),
    "tp": ("N", "tensor-parallel degree"),
    "dp": ("N", "data-parallel degree"),
}
DOTTED = {"tp": "layout.tp", "dp": "layout.dp"}


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add the options that set the configuration; each overrules the file and the environment."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", metavar="FILE", type=Path, help="TOML file")
    for name, (metavar, text) in KEYS.items():
        group.add_argument(f"--{name}", metavar=metavar, help=text)
    group.add_argument(
        "--layout", metavar="KEY=N[,KEY=N]", action="append", default=[], help="degrees of mesh axes: dp=2,tp=4"
    )
    group.add_argument("--backend-option", metavar="KEY=VALUE", action="append", default=[], help="repeatable")
    group.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="any dotted key (cache.pages); repeatable"
    )


def load_config(args: Namespace, **more: str | None) -> EngineConfig:
    """The configuration that the options ask for; `more` are further dotted keys, None where not given."""
    from lineshaft import config

    given = {**overrides(args), **{key: value for key, value in more.items() if value is not None}}
    return config.load_config(args.config, config.environment(), given)


def overrides(args: Namespace) -> dict[str, str]:
    """The dotted keys that options set: first `--set`, then `--layout`, so that an option of a key's own name wins."""
    given = dict(pairs("--set", args.set))
    given |= degrees(args.layout)
    given |= {f"backend_options.{key}": value for key, value in pairs("--backend-option", args.backend_option)}
    named = {DOTTED.get(name, name): getattr(args, name) for name in KEYS}
    return given | {key: value for key, value in named.items() if value is not None}


def degrees(texts: Iterable[str]) -> dict[str, str]:
    """The dotted key of each degree of KEY=N[,KEY=N]. Raises InvalidValue."""
    from lineshaft.layout import AXES

    parts = [part.strip() for text in texts for part in text.split(",")]
    found = list(pairs("--layout", parts))
    keys = [key for key, _ in found]
    for key, value in found:
        if key not in AXES or not value.strip().isdecimal() or keys.count(key) > 1:
            raise InvalidValue(
                f"--layout {key}={value}: allowed are {', '.join(AXES)}, each once, with a whole number: dp=2,tp=4"
            )
    return {f"layout.{key}": value.strip() for key, value in found}


def pairs(option: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The key and value of each KEY=VALUE."""
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise InvalidValue(f"{option} {text!r}: it should be KEY=VALUE")
        yield key.strip(), value


def check_writable(file: Path, option: str = "--out") -> None:
    """Raises InvalidValue, before any work, for a file that could not be written after it."""
    folder = file.absolute().parent
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise InvalidValue(f"{option} {file}: it cannot be written; name a file in a folder that exists and is yours")
