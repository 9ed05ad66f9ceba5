"""Writes the phases of steps as a timeline for Perfetto or chrome://tracing (the Trace Event Format)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEVICE_PHASES = frozenset({"run"})
"""Phases that may lie beside the host's; they get a line of their own."""
LINES = ("host", "device")


class Recorder:
    """Takes spans as the engine gives them (`Engine.recorder`): seconds of one clock."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, float, float, dict[str, int]]] = []

    def span(self, name: str, begin: float, end: float, **facts: int) -> None:
        """Note a phase."""
        self._spans.append((name, begin, end, facts))

    def seconds(self) -> dict[str, float]:
        """Time in each phase, in all."""
        total: dict[str, float] = {}
        for name, begin, end, _ in self._spans:
            total[name] = total.get(name, 0.0) + end - begin
        return total

    def events(self) -> list[dict[str, Any]]:
        """Complete events in microseconds from the first span on, after the names of their lines."""
        start = min((begin for _, begin, _, _ in self._spans), default=0.0)
        named = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": line, "args": {"name": name}}
            for line, name in enumerate(LINES)
        ]
        spans = [
            {
                "name": name, "ph": "X", "pid": 1, "tid": int(name in DEVICE_PHASES),
                "ts": 1e6 * (begin - start), "dur": 1e6 * (end - begin), "args": facts,
            }
            for name, begin, end, facts in sorted(self._spans, key=lambda span: (span[1], -span[2]))
        ]  # fmt: skip
        return [*named, *spans]

    def write(self, file: Path) -> None:
        """Write the JSON object that the viewers open."""
        made = {"traceEvents": self.events(), "displayTimeUnit": "ms"}
        file.write_text(json.dumps(made) + "\n", encoding="utf-8")
