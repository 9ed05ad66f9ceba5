"""Merges a TOML file, the environment and options into one EngineConfig, each value remembered with its source.

An error names the dotted key, the source and what is allowed. It knows no key by name: the models say what exists.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from lineshaft.config.environment import PREFIX
from lineshaft.config.models import EngineConfig
from lineshaft.config.profiles import PROFILES
from lineshaft.config.values import Given, complaint, dotted, settle
from lineshaft.errors import ConfigError, InvalidValue

DEFAULT: Final = "default"


def load_config(file: Path | None, environment: Mapping[str, str], overrides: Mapping[str, Any]) -> EngineConfig:
    """The configuration from the named profile, overruled by `file` (TOML), then `environment`, then `overrides`.

    Variables are `LINESHAFT_KEY` and `LINESHAFT_TABLE__KEY`; other variables are not looked at. Overrides have dotted
    keys or nested tables. Text from variables and overrides is converted to the key's type; a file must give the type
    itself. Raises UnknownKey, InvalidValue, and ConfigError for a file that is missing or is not TOML.
    """
    return build(merge(gather(file, environment, overrides)))


def gather(file: Path | None, environment: Mapping[str, str], overrides: Mapping[str, Any]) -> list[Given]:
    """Every value that is given, checked, each with its source; of two for a key the later one counts.

    The values of the profile that is named come first, so that every other one counts more.
    """
    given = [*from_file(file), *from_environment(environment), *from_overrides(overrides)]
    settled = [settle(item) for item in given]
    return [*map(settle, from_profile(settled)), *settled]


def from_profile(settled: Iterable[Given]) -> Iterator[Given]:
    """The values of the profile that is named last; none where none is."""
    name = next((item.value for item in reversed([*settled]) if item.path == ("profile",)), None)
    for key, value in PROFILES.get(str(name), {}).items():
        yield Given(tuple(key.split(".")), value, f"profile {name}", text=False)


def make_config(**values: Any) -> EngineConfig:
    """The configuration from keyword arguments alone, with the errors of `load_config`."""
    return load_config(None, {}, values)


def from_file(file: Path | None) -> Iterator[Given]:
    """The values that a TOML file gives; none without a file. Raises ConfigError."""
    if file is None:
        return
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the file {file}: {error.strerror}; give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"the file {file} is not TOML: {error}; correct it there") from error
    yield from flatten((), table, f"file {file}", text=False)


def from_environment(environment: Mapping[str, str]) -> Iterator[Given]:
    """The values that variables give, in the order of their names."""
    for name in sorted(environment):
        if name.startswith(PREFIX):
            path = tuple(name.removeprefix(PREFIX).lower().split("__"))
            yield Given(path, environment[name], f"variable {name}", text=True, spell=variable)


def variable(path: Iterable[str]) -> str:
    """The name of the variable that sets a key."""
    return PREFIX + "__".join(path).upper()


def from_overrides(overrides: Mapping[str, Any]) -> Iterator[Given]:
    """The values that options or keyword arguments give."""
    for key, value in overrides.items():
        path = tuple(key.split("."))
        yield from flatten(path, value, f"option {key}", text=True)


def flatten(path: tuple[str, ...], value: Any, source: str, *, text: bool) -> Iterator[Given]:
    """The leaves of nested tables; an empty table is a leaf, so that its name is checked too."""
    if not isinstance(value, Mapping) or (path and not value):
        yield Given(path, value, source, text)
        return
    for key, inner in value.items():
        yield from flatten((*path, str(key)), inner, source, text=text)


def merge(given: Iterable[Given]) -> dict[str, Any]:
    """One nested table; of two values for a key the later one stays."""
    tree: dict[str, Any] = {}
    for item in given:
        table = tree
        for key in item.path[:-1]:
            if not isinstance(table.get(key), dict):
                table[key] = {}
            table = table[key]
        if item.value != {}:
            table[item.path[-1]] = item.value
    return tree


def build(tree: dict[str, Any]) -> EngineConfig:
    """The frozen configuration; what is left to go wrong concerns several keys or a missing one."""
    try:
        return EngineConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = tuple(map(str, first["loc"]))
        key = dotted(path)
        if first["type"] == "missing":
            where = f"in the file, as {variable(path)} or as --{key}"
            raise InvalidValue(f"{key} is not set; set it {where}") from error
        raise InvalidValue(f"{key}: {complaint(error)}") from error


def settings(given: Iterable[Given]) -> list[Given]:
    """Every key in order, those of free tables that are set, too, with its value, None where it is unset, and where
    that comes from. Without a model it is unset. Raises InvalidValue."""
    items = list(given)
    sources = {("model",): DEFAULT} | {item.path: item.source for item in items}
    config = build({"model": ""} | merge(items)).model_dump()
    if sources["model",] == DEFAULT:
        config["model"] = None
    found = flatten((), config, DEFAULT, text=False)
    return [replace(item, source=sources.get(item.path, DEFAULT)) for item in found]
