"""Checks of a backend, level by level: each file yields the checks of one theme for the backend at hand."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from lineshaft_conformance.checks import Check
from lineshaft_conformance.subject import Subject
from lineshaft_contract.ops.spec import Size

THEMES = (
    "load", "ahead", "ops", "paging", "graphs", "weights", "collectives", "ranks", "engine", "determinism", "speed",
)  # fmt: skip
"""Files of this folder, in the order in which their checks run, each with `checks(subject, size)`."""


def collect(subject: Subject, size: Size, level: int = 5) -> Iterator[Check]:
    """Every check up to a level; their ids are the same for every backend of the same claims."""
    for theme in THEMES:
        for check in import_module(f"{__name__}.{theme}").checks(subject, size):
            if check.level <= level:
                yield check
