"""A plugin for tests: two equally good norms for the CPU backend. `rivals_a` is late on even ranks, `rivals_b` on odd
ones; a kernel that the variable RIVALS_BROKEN names raises instead."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from lineshaft_contract.hooks import hookimpl
from lineshaft_contract.kernels import Kernel
from lineshaft_torch.bound import BoundKernel
from lineshaft_torch.kernels import portable_kernels

LATE = 0.003


def rival(name: str, late_on: int) -> Kernel:
    base = next(kernel for kernel in portable_kernels("cpu") if kernel.op == "rms_norm")

    def bind(problem: Any, session: Any) -> BoundKernel:
        if name in os.environ.get("RIVALS_BROKEN", ""):
            raise RuntimeError(f"{name} is broken")
        inner = base.bind(problem, session)
        pause = LATE * (session.world.rank % 2 == late_on)

        def run(*args: Any, **kwargs: Any) -> Any:
            time.sleep(pause)
            return inner.run(*args, **kwargs)

        return BoundKernel(run, session, inner.out)

    return replace(base, name=name, bind=bind, priority=1000, tunable=True)


@hookimpl
def lineshaft_kernels(backend: str) -> list[Kernel]:
    return [rival("rivals_a", 0), rival("rivals_b", 1)] if backend == "cpu" else []
