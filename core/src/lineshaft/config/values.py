"""Checks one given value against the models: finds its key, converts its text, and words what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lineshaft.config.models import EngineConfig
from lineshaft.errors import InvalidValue, UnknownKey

KeyPath = tuple[str, ...]
Fields = Mapping[str, FieldInfo]


def dotted(path: Iterable[str]) -> str:
    return ".".join(path)


@dataclass(frozen=True)
class Given:
    """One value, where it came from, whether it came as text (and is then converted to the key's type), and how keys
    are spelled there."""

    path: KeyPath
    value: Any
    source: str
    text: bool
    spell: Callable[[KeyPath], str] = dotted


def settle(given: Given) -> Given:
    """The same with its value checked and converted. Raises UnknownKey or InvalidValue."""
    model: type[BaseModel] = EngineConfig
    for depth, key in enumerate(given.path, start=1):
        field = model.model_fields.get(key)
        if field is None:
            raise UnknownKey(unknown_key(given, given.path[: depth - 1], model.model_fields))
        if not is_table(field):
            return settle_field(given, field, given.path[depth:])
        model = field.annotation  # type: ignore[assignment]
    return settle_table(given)


def is_table(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def settle_table(given: Given) -> Given:
    """A path that ends at a table may only bring an empty table, which says nothing."""
    if given.value == {} or isinstance(given.value, BaseModel):
        return given
    raise InvalidValue(wrong(given, "it is a table; give one of its keys"))


def settle_field(given: Given, field: FieldInfo, rest: KeyPath) -> Given:
    """A path that ends at a value, or inside a free table (`dict[str, X]`) whose keys are not ours."""
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    if get_origin(field.annotation) is dict:
        if not rest:
            return settle_table(given)
        kind, rest = get_args(field.annotation)[1], rest[1:]
        if kind is Any:
            return given
    if rest or isinstance(given.value, Mapping):
        raise InvalidValue(wrong(given, f"{dotted(given.path[: len(given.path) - len(rest)])} is a value, not a table"))
    return replace(given, value=convert(given, kind, field.description))


def convert(given: Given, kind: Any, meaning: str | None) -> Any:
    """The value as `kind`: strictly, or from text where it came as text ("none" unsets a key that may be unset)."""
    adapter = TypeAdapter(kind)
    try:
        if not (given.text and isinstance(given.value, str)):
            return adapter.validate_python(given.value, strict=True)
        if given.value.strip().lower() == "none":
            with suppress(ValidationError):
                return adapter.validate_python(None)
        return adapter.validate_strings(given.value, strict=False)
    except ValidationError as error:
        raise InvalidValue(wrong(given, complaint(error), meaning)) from error


def complaint(error: ValidationError) -> str:
    """What is allowed, in pydantic's words, without its layout."""
    return error.errors(include_url=False)[0]["msg"].replace("Input should", "it should").removeprefix("Value error, ")


def wrong(given: Given, allowed: str, meaning: str | None = None) -> str:
    """One line: the key, the value and its source, what is allowed, what the key means."""
    line = f"{dotted(given.path)} = {given.value!r} (from {given.source}): {allowed}"
    return f"{line} ({meaning})" if meaning else line


def unknown_key(given: Given, table: KeyPath, known: Fields) -> str:
    """One line: the key, its source, the nearest key that exists, or all of the table's."""
    line, key = f"unknown key {dotted(given.path)} (from {given.source})", given.path[len(table)]
    meant = None if table else misjoined(key, known)
    return f"{line}; {did_you_mean(meant, given.spell) if meant else suggestion(key, table, known, given.spell)}"


def misjoined(key: str, known: Fields) -> KeyPath | None:
    """The path that was meant where a table and its key are joined by one underscore: cache_pages."""
    for name, field in known.items():
        rest, inner = key.removeprefix(f"{name}_"), field.annotation
        if rest == key:
            continue
        if get_origin(inner) is dict:
            return (name, rest)
        if is_table(field) and (near := get_close_matches(rest, inner.model_fields, n=1)):  # type: ignore[union-attr]
            return (name, near[0])
    return None


def suggestion(key: str, table: KeyPath, known: Iterable[str], spell: Callable[[KeyPath], str] = dotted) -> str:
    """The nearest known keys with their table's path, or all of them."""
    names = list(known)
    near = get_close_matches(key, names, n=1)
    if near:
        return did_you_mean((*table, near[0]), spell)
    return f"allowed here: {', '.join(names)}" if names else "no key is allowed here"


def did_you_mean(path: KeyPath, spell: Callable[[KeyPath], str]) -> str:
    return f"did you mean {spell(path)}?"
