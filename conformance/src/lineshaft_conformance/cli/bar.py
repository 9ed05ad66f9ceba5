"""Shows how far a run is, on stderr, where that is a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lineshaft_conformance.results import Result, Status

TOLD = 5
"""How often a run tells how far it is where there is no terminal."""


class Bar:
    """A progress callback of a run; use it as a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("loading", total=None, failed=0)
        self._failed = 0

    def __call__(self, done: int, total: int, result: Result) -> None:
        self._failed += result.status is Status.FAIL
        theme = "/".join(result.id.split("/")[:2])
        if self._bar.disable and done * TOLD // total > (done - 1) * TOLD // total:
            print(f"{done} of {total} done, {self._failed} failed", file=sys.stderr, flush=True)
        self._bar.update(self._task, completed=done, total=total, description=theme, failed=self._failed)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
