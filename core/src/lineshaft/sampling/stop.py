"""Stop strings over streamed text: what may be shown now, and whether a stop string is complete.

Knows text only, no tokens.
"""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Cuts one request's text at the stop string that is complete first; of several that end together, the longest.

    The result does not depend on how the text is cut into deltas. A tail that may still become a stop string is held
    back until more text or `flush` settles it.
    """

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        """stops: non-empty strings, may be none; include: whether the stop string itself is shown."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.hit: str | None = None  # the stop string that ended the text

    def feed(self, delta: str) -> tuple[str, bool]:
        """Take more text; return the text that is safe to show now, and whether a stop string has been hit."""
        if self.hit is not None:
            return "", True
        text = self._held + delta
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.hit = min(found)
            self._held = ""
            return text[: end if self._include else start], True
        safe = len(text) - self._possible_stop(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return what is still held back: the text ends here."""
        held, self._held = self._held, ""
        return held

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest tail of text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
