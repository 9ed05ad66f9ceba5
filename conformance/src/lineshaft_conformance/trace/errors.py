"""The error of this folder."""

from __future__ import annotations

from lineshaft.errors import LineshaftError


class TraceError(LineshaftError):
    """A trace cannot be made, read or replayed: missing, damaged, of another version or model, or not of one worker."""
