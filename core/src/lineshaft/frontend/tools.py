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
from collections.abc import Iterator
from typing import Any

from lineshaft.outputs import ToolCall

HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
MISTRAL = "[TOOL_CALLS]"
NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
LLAMA = "<|python_tag|>"
DECODER = json.JSONDecoder()


def tool_calls(text: str, names: frozenset[str]) -> list[ToolCall]:
    """The calls in an answer, special tokens and all. What is no call, or is broken, is none.

    A call without any mark around it counts only under one of `names`: else it is an answer that happens to be JSON.
    """
    if "<tool_call>" in text:
        found = (value for body in HERMES.findall(text) for value in _values(body))
        return list(_calls(found))
    if MISTRAL in text:
        return list(_calls(value for part in text.split(MISTRAL)[1:] for value in _mistral(part)))
    head, tag, rest = text.partition(LLAMA)
    made = list(_calls(_values(rest if tag else head)))
    return made if tag or all(call.name in names for call in made) else []


def _mistral(part: str) -> Iterator[Any]:
    """The calls of one mark: a list of them, or a name before its arguments."""
    if named := NAMED.match(part):
        yield from ({"name": named[1], "arguments": value} for value in _values(part[named.end() :]))
        return
    for value in _values(part):
        yield from value if isinstance(value, list) else [value]


def _values(text: str) -> Iterator[Any]:
    """The JSON values at the beginning of a text, with ";" between them."""
    at = 0
    while True:
        at = _skipped(text, at)
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield value
        at = _skipped(text, at)
        if text[at : at + 1] != ";":
            return
        at += 1


def _skipped(text: str, at: int) -> int:
    return at + len(text[at:]) - len(text[at:].lstrip())


def _calls(values: Iterator[Any]) -> Iterator[ToolCall]:
    for value in values:
        if isinstance(value, dict):
            name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
            if isinstance(name, str) and isinstance(arguments, dict):
                yield ToolCall(name, arguments)
