"""Tests of kernels that Triton's interpreter runs: collected only in a process that was started to interpret."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import Problem
from lineshaft_triton.interpreting import interpreting
from lineshaft_triton.targets import TARGETS

Bind = Callable[[str, Problem], Any]


collect_ignore_glob = [] if interpreting() else ["test_*.py"]
"""`test_triton_interpreted.py` runs them, in processes of their own."""


@pytest.fixture
def kernels() -> dict[str, Kernel]:
    """The kit's kernels for one target, by name."""
    from lineshaft_triton.kernels import triton_kernels

    return {kernel.name: kernel for kernel in triton_kernels("test", TARGETS["sm90"])}


@pytest.fixture
def bind(kernels: dict[str, Kernel]) -> Bind:
    """Binds a kernel, by its name, to a problem and a session on the host; it has to support the problem."""
    from lineshaft_torch.session import TorchSession

    session = TorchSession()

    def bound(name: str, problem: Problem) -> Any:
        kernel = kernels[name]
        assert kernel.supports(problem) is None
        return kernel.bind(problem, session)

    return bound
