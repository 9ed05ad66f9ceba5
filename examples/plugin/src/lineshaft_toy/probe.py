"""Looks whether the backend can run here. It finds PyTorch, and never imports it."""

from __future__ import annotations

from importlib.util import find_spec

from lineshaft.contract.backends import Probe


def probe() -> Probe:
    """Usable where PyTorch is installed."""
    if find_spec("torch") is None:
        return Probe(False, "PyTorch is not installed; run `pip install lineshaft-torch`")
    return Probe(True, "PyTorch is installed", ("host",))
