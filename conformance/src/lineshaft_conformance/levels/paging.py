"""Checks to come."""

from __future__ import annotations

from collections.abc import Iterator

from lineshaft_conformance.checks import Check, Size
from lineshaft_conformance.subject import Subject


def checks(subject: Subject, size: Size) -> Iterator[Check]:
    """Every check of this file."""
    yield from ()
