"""Microseconds of the CPU backend's kernels on the shapes of a small model's decode step.

    python benchmarks/cpu_ops.py [threads]

Weights and caches are many, so that they come from memory as in a real step; the least of several rounds is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lineshaft.contract.backends import World
from lineshaft.contract.problems import AttendProblem, KVProblem, LinearProblem, NormProblem, PointwiseProblem, Problem
from lineshaft.contract.steps import HostStep, StepInputs, StepShape, forward_inputs
from lineshaft_cpu.backend import create
from lineshaft_cpu.options import CpuOptions

HIDDEN, Q_HEADS, KV_HEADS, DIM, WIDTH, PAGE = 576, 9, 3, 64, 1536, 16
DTYPE, COPIES, ROUNDS = "bfloat16", 24, 15


def least_us(call: Callable[[int], Any]) -> float:
    """Microseconds of one call; `call(i)` works on the i-th copy of its data."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for i in range(COPIES):
            call(i)
        best = min(best, (time.perf_counter() - start) / COPIES)
    return best * 1e6


def best_kernel(kernels: Any, op: str, problem: Problem, session: Any) -> tuple[str, Callable[..., Any]]:
    fitting = [k for k in kernels if k.op == op and not problem.features() - k.handles and not k.supports(problem)]
    chosen = max(fitting, key=lambda k: k.priority)
    return chosen.name, chosen.bind(problem, session)


def decode_step(rows: int, context: int) -> StepInputs:
    """One query a row over `context` keys on random pages."""
    pages = -(-context // PAGE)
    shape = StepShape(rows, rows, (pages,), rows, 1)
    host = HostStep(forward_inputs(shape))
    ids = np.random.default_rng(0).permutation(rows * pages) + 1
    host["page_table.0"][:] = ids.reshape(rows, pages)
    host["context_lens.0"][:] = context
    host["query_starts"][:] = np.arange(rows + 1)
    return StepInputs({name: torch.from_numpy(view) for name, view in host.views.items()}, shape)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def measure(rows: int, context: int, kernels: Any, session: Any) -> None:
    def show(op: str, problem: Problem, call: Callable[[Callable[..., Any], int], Any], note: str) -> None:
        name, bound = best_kernel(kernels, op, problem, session)
        print(f"rows {rows:3}  {op:10} {name:16} {note:14} {least_us(lambda i: call(bound, i)):9.1f} us")

    for n, k in ((HIDDEN + 2 * KV_HEADS * DIM, HIDDEN), (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)):
        x, weights = random(rows, k), [random(n, k) for _ in range(COPIES)]
        problem = LinearProblem(dtype=DTYPE, m=rows, n=n, k=k)
        show("linear", problem, lambda bound, i, x=x, w=weights: bound(x, w[i]), f"k={k} n={n}")  # type: ignore[misc]
    x, gated, norm = random(rows, HIDDEN), random(rows, 2 * WIDTH), NormProblem(dtype=DTYPE, width=HIDDEN, eps=1e-5)
    show("rms_norm", norm, lambda bound, i: bound(x, x[0]), f"width={HIDDEN}")
    show("silu_mul", PointwiseProblem(dtype=DTYPE), lambda bound, i: bound(gated), f"width={WIDTH}")
    kv = KVProblem(dtype=DTYPE, kv_dtype=DTYPE, kv_heads=KV_HEADS, qk_dim=DIM, v_dim=DIM, page_size=PAGE)
    step, q = decode_step(rows, context), random(rows, Q_HEADS, DIM)
    caches = session.alloc_caches([kv] * COPIES, [rows * -(-context // PAGE) + 1], "slots")
    attend = AttendProblem(
        dtype=DTYPE, kv_dtype=DTYPE, q_heads=Q_HEADS, kv_heads=KV_HEADS, qk_dim=DIM, v_dim=DIM, page_size=PAGE,
        scale=DIM**-0.5, tokens=rows, rows=rows, pages=step.shape.pages[0], max_query=1,
    )  # fmt: skip
    show("attend", attend, lambda bound, i: bound(q, caches[i], step), f"context={context}")


@torch.inference_mode()
def main(threads: int) -> None:
    backend = create(CpuOptions(), World(threads=threads))
    session = backend.session(0)
    for rows, context in ((1, 128), (32, 200)):
        measure(rows, context, backend.kernels(), session)
    session.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
