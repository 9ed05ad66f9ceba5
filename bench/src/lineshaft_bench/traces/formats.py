"""The formats of trace files, a line at a time: Azure's CSV, Mooncake's JSON lines, and our own JSON lines.

Azure: https://github.com/Azure/AzurePublicDataset (the traces of 2023 and of 2024). Mooncake:
https://github.com/kvcache-ai/Mooncake (FAST25-release/traces). A line that is wrong raises BadLine, which says how.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lineshaft_bench.traces.arrivals import MOST_TOKENS, Arrival, Segment

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")
OWN_KEYS = ("arrival_s", "prompt_tokens", "output_tokens")
MOONCAKE_BLOCK = 512
"""Tokens that one of Mooncake's hash ids stands for."""
PLAIN_REPLY = 0
"""The content of outputs that no prompt holds."""

Parse = Callable[[str], Arrival]


class BadLine(ValueError):
    """What is wrong with one line."""


class Contents:
    """Gives each content a small id: known names keep theirs, and `fresh` ones are nobody else's."""

    def __init__(self) -> None:
        self._next = PLAIN_REPLY
        self._named: dict[object, int] = {}

    def fresh(self) -> int:
        """An id that was never given."""
        self._next += 1
        return self._next

    def named(self, name: object) -> int:
        """The id of that name."""
        found = self._named.get(name)
        if found is None:
            found = self._named[name] = self.fresh()
        return found


def parser_of(first: str) -> tuple[Parse, bool] | None:
    """How to read a file with this first line, and whether that line is only a header; None for an unknown format."""
    columns = [column.strip() for column in first.split(",")]
    if set(AZURE_COLUMNS) <= set(columns):
        return azure(columns), True
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return None
    for keys, make in ((MOONCAKE_KEYS, mooncake), (OWN_KEYS, own)):
        if isinstance(found, Mapping) and keys[0] in found:
            return make(), False
    return None


def azure(columns: Sequence[str]) -> Parse:
    """Rows of a date and two counts. A date without an offset is UTC, as in the trace of 2023."""
    when, context, generated = (columns.index(name) for name in AZURE_COLUMNS)
    contents = Contents()

    def parse(line: str) -> Arrival:
        cells = line.split(",")
        if len(cells) != len(columns):
            raise BadLine(f"{len(cells)} columns where the header has {len(columns)}")
        prompt = count(AZURE_COLUMNS[1], cells[context])
        return Arrival(date(cells[when]), ((contents.fresh(), prompt),), count(AZURE_COLUMNS[2], cells[generated]))

    return parse


def mooncake() -> Parse:
    """Objects whose `hash_ids` name blocks of 512 tokens, and all before them; tokens past the last are nobody's."""
    contents = Contents()

    def parse(line: str) -> Arrival:
        values = table(line, MOONCAKE_KEYS)
        tokens = count("input_length", values["input_length"])
        names = values.get("hash_ids") or ()
        if not isinstance(names, list | tuple) or not all(isinstance(name, int | str) for name in names):
            raise BadLine(f"hash_ids = {names!r:.60}: give a list of numbers")
        prompt = blocks(contents, [(name, MOONCAKE_BLOCK) for name in names], tokens)
        at = seconds("timestamp", values["timestamp"]) / 1e3
        return Arrival(at, prompt, count("output_length", values["output_length"]))

    return parse


def own() -> Parse:
    """Objects of `arrival_s`, `prompt_tokens`, `output_tokens`; `blocks` ([name, tokens] pairs that begin the prompt),
    `reply` (a block's name for the output), `priority` and `deadline_s` may be left out."""
    contents = Contents()

    def parse(line: str) -> Arrival:
        values = table(line, OWN_KEYS)
        tokens = count("prompt_tokens", values["prompt_tokens"])
        given = [(str(name), count("blocks", size)) for name, size in pairs(values.get("blocks", []))]
        priority, deadline = values.get("priority", 0), values.get("deadline_s")
        if not isinstance(priority, int):
            raise BadLine(f"priority = {priority!r:.60}: give a whole number")
        return Arrival(
            seconds("arrival_s", values["arrival_s"]),
            blocks(contents, given, tokens),
            count("output_tokens", values["output_tokens"]),
            contents.named(str(values["reply"])) if "reply" in values else PLAIN_REPLY,
            priority,
            None if deadline is None else seconds("deadline_s", deadline),
        )

    return parse


def pairs(value: Any) -> Sequence[Sequence[Any]]:
    """The value, if it is a list of pairs."""
    if not isinstance(value, list) or not all(isinstance(item, list) and len(item) == 2 for item in value):
        raise BadLine(f"blocks = {value!r:.60}: give a list of [name, tokens]")
    return value


def blocks(contents: Contents, named: Sequence[tuple[object, int]], tokens: int) -> tuple[Segment, ...]:
    """The named blocks, cut to `tokens`; the rest of the prompt is content of its own."""
    found: list[Segment] = []
    left = tokens
    for name, size in named:
        if left:
            found.append((contents.named(name), min(size, left)))
            left -= found[-1][1]
    return (*found, (contents.fresh(), left)) if left else tuple(found)


def table(line: str, keys: Sequence[str]) -> Mapping[str, Any]:
    """The object of a line, which has at least these keys."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"it is not JSON ({str(error)[:60]})") from None
    if not isinstance(found, Mapping):
        raise BadLine(f"it is no object but {line:.40}")
    missing = [key for key in keys if key not in found]
    if missing:
        raise BadLine(f"it lacks {', '.join(missing)}")
    return found


def count(name: str, value: object) -> int:
    """A number of tokens, from a cell or as JSON has it."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        raise BadLine(f"{name} = {value!r:.40}: give a whole number from 1 to {MOST_TOKENS}")
    return value


def seconds(name: str, value: object) -> float:
    """A finite time that is not negative, in whatever unit the format has."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf or value > 1e15:
        raise BadLine(f"{name} = {value!r:.40}: give a number from 0 to 1e15")
    return float(value)


def date(text: str) -> float:
    """Seconds since 1970 of an ISO date; with any number of digits after the second."""
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadLine(f"TIMESTAMP = {text!r:.40}: give a date like 2023-11-16 18:15:46.680590") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
