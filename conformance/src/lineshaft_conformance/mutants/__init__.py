"""Broken backends: each breaks one rule of the contract, and the suite must fail it at the level that it names.

They are made of the CPU backend, and need `lineshaft-cpu`. Every mutant is a few lines in a file of its theme.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lineshaft_conformance.mutants.mutant import Mutant

THEMES = ("attention", "schemes", "ops", "paging", "graphs", "weights", "collectives", "engine", "whole")
"""Files of this folder, each with `MUTANTS: tuple[Mutant, ...]`."""


@cache
def gallery() -> Mapping[str, Mutant]:
    """Every mutant by name. Raises ImportError where `lineshaft-cpu` is not installed."""
    found = [mutant for theme in THEMES for mutant in import_module(f"{__name__}.{theme}").MUTANTS]
    names = [mutant.name for mutant in found]
    assert len(set(names)) == len(names), "two mutants share a name"
    return {mutant.name: mutant for mutant in found}
