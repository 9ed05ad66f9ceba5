"""Mutants to come."""

from __future__ import annotations

from lineshaft_conformance.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = ()
