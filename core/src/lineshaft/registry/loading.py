"""Turns a lazy "module:attribute" reference into the object; knows nothing about what is loaded."""

from __future__ import annotations

import re
from pkgutil import resolve_name
from typing import Any

from lineshaft.errors import PluginError


def load_attribute(reference: str) -> Any:
    """The object that "module:attribute" names. Raises PluginError that carries the import's own reason."""
    if not re.fullmatch(r"[^:]+:[^:]+", reference):
        raise PluginError(f"{reference!r} is no reference; allowed is 'module:attribute'")
    try:
        return resolve_name(reference)
    except Exception as error:
        raise PluginError(f"cannot load {reference!r}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The error's class and message on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
