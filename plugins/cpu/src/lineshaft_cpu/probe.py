"""Looks whether the CPU backend can run here, and on what processor; it finds PyTorch but never imports it."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path

from lineshaft_contract.backends import Probe
from lineshaft_contract.host import usable_cpus

CPUINFO = Path("/proc/cpuinfo")


def probe() -> Probe:
    """Usable where PyTorch is installed; the one device is the processor."""
    if find_spec("torch") is None:
        return Probe(False, "PyTorch is not installed; run `pip install lineshaft-torch`")
    return Probe(True, "PyTorch is installed", (f"{model_name()}, {usable_cpus()} CPUs",))


def model_name() -> str:
    """The processor's name as the kernel tells it, or the machine's architecture."""
    try:
        with CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), machine())
    except OSError:
        return machine()


def machine() -> str:
    return platform.machine() or "unknown processor"
