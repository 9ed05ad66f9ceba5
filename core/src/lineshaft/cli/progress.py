"""Shows how far a start-up is, on stderr, where that is a terminal."""

from __future__ import annotations

from tqdm import tqdm


class Bar:
    """A progress callback: one bar for each thing that goes on."""

    def __init__(self) -> None:
        self._what = ""
        self._done = 0
        self._bar: tqdm[None] | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None or what != self._what:
            self.close()
            self._bar, self._what, self._done = tqdm(total=total, desc=what, leave=False, disable=None), what, 0
        self._bar.update(done - self._done)
        self._done = done

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
