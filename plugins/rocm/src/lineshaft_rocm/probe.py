"""Looks whether the rocm backend can run here; imports neither PyTorch nor Triton."""

from __future__ import annotations

from lineshaft_contract.backends import Probe

INTERPRETED = {"interpret": "true"}


def probe() -> Probe:
    return Probe(False, "no AMD GPU is driven yet", unless=INTERPRETED)
