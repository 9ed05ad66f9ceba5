"""What a structured output is asked for: one JSON schema, regular expression, grammar or list of choices.

Plain data; `grammar` makes token masks of it.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lineshaft.errors import InvalidStructure

MAX_CHARS = 1 << 20
"""Longest text of a structure; what takes too long to compile is bounded by the grammar's own limits."""


@dataclass(frozen=True)
class Structured:
    """The output is exactly one of these; the request ends when it is complete.

    json     a JSON schema, as a dict or as text
    regex    a regular expression (of Rust's `regex`) that the whole output matches
    grammar  a Lark grammar, or GBNF as llama.cpp reads it
    choice   one of these strings

    Raises InvalidStructure for none or several of them, for what is no JSON, and for more than 2^20 characters. After
    construction `json` is text and `choice` a tuple.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise InvalidStructure(
                f"structured with {' and '.join(given) or 'nothing'}: give one of json, regex, grammar, choice"
            )
        value = getattr(self, given[0])
        made = {"json": _schema, "choice": _choices}.get(given[0], _text)(given[0], value)
        if sum(map(len, made)) > MAX_CHARS:
            raise InvalidStructure(f"structured.{given[0]} is longer than {MAX_CHARS} characters: give a smaller one")
        object.__setattr__(self, given[0], made)

    @property
    def kind(self) -> str:
        """Which of the four it is."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def value(self) -> str | tuple[str, ...]:
        """The text, or the choices."""
        made: str | tuple[str, ...] = getattr(self, self.kind)
        return made


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidStructure(f"structured.{name} given as {type(value).__name__}: give a text that is not empty")
    return value


def _schema(name: str, value: object) -> str:
    try:
        schema = json_text.loads(value) if isinstance(value, str) else value
        text = json_text.dumps(schema)  # the order of keys is kept: it is that of the output
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidStructure(f"structured.json is no JSON ({error}): give a JSON schema") from error
    if not isinstance(schema, Mapping | bool):
        raise InvalidStructure(f"structured.json given as {type(schema).__name__}: give a JSON schema, an object")
    return text


def _choices(name: str, value: object) -> tuple[str, ...]:
    listed = tuple(value) if isinstance(value, list | tuple) else ()
    if not listed or not all(isinstance(text, str) and text for text in listed):
        raise InvalidStructure("structured.choice: give a list of strings, none of them empty")
    return listed
