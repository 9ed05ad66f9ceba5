"""The native engine as the suite's harness starts it, at a level and with so many threads."""

from __future__ import annotations

from functools import cached_property

from lineshaft_conformance.harness.paged import Layout, Miniature
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.backends import Backend, World
from lineshaft_cpu import native
from lineshaft_cpu.backend import NativeBackend
from lineshaft_cpu.options import CpuOptions

PANELS, SLOTS = Layout(page_size=32, dim=32, columns=3), Layout(page_size=5, dim=32, columns=6)
"""Caches whose pages are in panels, and in rows of slots."""


class Native(Subject):
    """The CPU backend by its native engine."""

    def __init__(self, threads: int = 2, level: str = "auto") -> None:
        super().__init__(Target("cpu"))
        self._threads, self._level = threads, level

    @cached_property
    def backend(self) -> Backend:
        return NativeBackend(CpuOptions(), World(threads=self._threads), native.load(self._level))


def miniature(threads: int = 2, layout: Layout = SLOTS, dtype: str = "float32", seed: int = 0) -> Miniature:
    """A model that writes keys and values and attends, and checks each step against the contract's references."""
    return Miniature(Native(threads), dtype, layout, seed=seed)
