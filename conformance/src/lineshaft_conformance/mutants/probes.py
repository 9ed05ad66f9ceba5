"""Probes that break the rules of probing; imports the contract alone, as a probe's module does."""

from __future__ import annotations

import time
from typing import Any

from lineshaft_contract.backends import Probe


def of_no_device() -> Probe:
    """Names a device that is not there."""
    return Probe(True, "found", ("imaginary accelerator 0",))


def with_torch() -> Probe:
    """Imports an array library."""
    import torch

    return Probe(True, f"torch {torch.__version__} imports")


def that_takes_its_time() -> Probe:
    """Tries the device."""
    time.sleep(3)
    return Probe(True, "found")


def without_reason() -> Probe:
    """Does not say why."""
    return Probe(True, "")


def in_words() -> Any:
    """Returns no Probe."""
    return "usable"


def that_raises() -> Probe:
    """Looks for a file that is not there."""
    raise FileNotFoundError("/dev/imaginary")
