"""What can be wrong with what a simulation or a benchmark is given."""

from __future__ import annotations

from lineshaft.errors import LineshaftError


class TraceFileError(LineshaftError):
    """A trace of requests cannot be read, or holds what no trace can; names the file and the line."""


class DeviceError(LineshaftError):
    """The description of a device cannot be found or read."""


class PeerError(LineshaftError):
    """Another engine cannot be started, or fails on its work."""


class PlotError(LineshaftError):
    """A plot cannot be drawn: its library or its file format is missing."""
