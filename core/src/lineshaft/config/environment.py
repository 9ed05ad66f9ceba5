"""The one place that reads the process environment; everything else is handed a mapping."""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "LINESHAFT_"


def environment() -> dict[str, str]:
    """A snapshot of the variables that configure lineshaft: those whose name begins with `LINESHAFT_`."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again (XDG base directories); where no home folder is known, one
    that nobody can write to."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull if base.startswith("~") else base) / "lineshaft"
