"""Tests of kernels that Triton's interpreter runs: collected only in a process that was started to interpret."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.problems import Problem
from lineshaft_triton.interpreting import VARIABLE, interpreting
from lineshaft_triton.targets import TARGETS

Bind = Callable[[str, Problem], Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interpreting():
        reason = f"{VARIABLE}=1 is not set; test_triton_interpreted.py runs this in a process of its own"
        for item in items:
            if "interpreted" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=reason))


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
