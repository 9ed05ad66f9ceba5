"""Finds the tool calls in an answer, in the formats that common models write.

```
<tool_call>{"name": ..., "arguments": {...}}</tool_call>      Hermes, Qwen
[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]          Mistral; also [TOOL_CALLS]name[ARGS]{...}
<|python_tag|>{"name": ..., "parameters": {...}}; ...         Llama 3, the tag or not
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lineshaft.outputs import ToolCall

HERMES, MISTRAL, LLAMA = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?(?=\s*\{)")
SPACES = re.compile(r"\s*")
DECODER = json.JSONDecoder()


def tool_calls(text: str, names: frozenset[str]) -> list[ToolCall]:
    """The calls in an answer, special tokens and all. What is no call, or is broken, is none.

    A call without any mark before it counts only under one of `names`: else it is an answer that happens to be JSON.
    """
    for mark in (HERMES, MISTRAL, LLAMA):
        if made := list(_calls(_marked(text, mark))):
            return made
    made = list(_calls(_values(text, 0)[0]))
    return made if all(call.name in names for call in made) else []


def _marked(text: str, mark: str) -> Iterator[Any]:
    """The JSON values after each mark, lists taken apart; of a name and an object, the object as its arguments."""
    at = text.find(mark)
    while at >= 0:
        at += len(mark)
        named = NAMED.match(text, at)
        values, at = _values(text, named.end() if named else at)
        for value in values:
            if named:
                yield {"name": named[1], "arguments": value}
            else:
                yield from value if isinstance(value, list) else [value]
        at = text.find(mark, at)


def _values(text: str, at: int) -> tuple[list[Any], int]:
    """The JSON values that begin at a place, with ";" between them, and where they end."""
    found: list[Any] = []
    while True:
        try:
            value, at = DECODER.raw_decode(text, _skipped(text, at))
        except (ValueError, RecursionError):
            return found, at
        found.append(value)
        following = _skipped(text, at)
        if not text.startswith(";", following):
            return found, at
        at = following + 1


def _skipped(text: str, at: int) -> int:
    """Where the spaces end that begin there."""
    match = SPACES.match(text, at)
    return match.end() if match else at


def _calls(values: Iterable[Any]) -> Iterator[ToolCall]:
    for value in values:
        if isinstance(value, dict):
            name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
            if isinstance(name, str) and isinstance(arguments, dict):
                yield ToolCall(name, arguments)
