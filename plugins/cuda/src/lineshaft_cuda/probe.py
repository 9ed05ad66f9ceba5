"""Looks whether the cuda backend can run here; imports neither PyTorch nor Triton."""

from __future__ import annotations

from lineshaft_contract.backends import Probe

INTERPRETED = {"interpret": "true"}


def probe() -> Probe:
    return Probe(False, "no NVIDIA GPU is driven yet", unless=INTERPRETED)
