"""Microseconds of the CPU backend's kernels of the torch engine on the shapes of a small model's decode step.

    python benchmarks/cpu_ops.py [threads]

Of every kernel that takes a problem, the one that a plan chooses first. Weights and caches are many, so that they come
from memory as in a real step; the least of several rounds is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lineshaft.plan import Resolver
from lineshaft_contract.backends import World
from lineshaft_contract.kernels import Bound, Kernel
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem, NormProblem, PointwiseProblem, Problem
from lineshaft_contract.steps import HostStep, StepInputs, StepShape, forward_inputs
from lineshaft_contract.weights import Local, Param, Stored, Weight
from lineshaft_cpu.backend import create
from lineshaft_cpu.options import CpuOptions
from lineshaft_torch.arrays import to_host
from lineshaft_torch.packing import dense_leaves, host_pack

HIDDEN, Q_HEADS, KV_HEADS, DIM, WIDTH, PAGE = 576, 9, 3, 64, 1536, 16
DTYPE, COPIES, ROUNDS = "bfloat16", 24, 15
CPU = torch.device("cpu")


def least_us(call: Callable[[int], Any]) -> float:
    """Microseconds of one call; `call(i)` works on the i-th copy of its data."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for i in range(COPIES):
            call(i)
        best = min(best, (time.perf_counter() - start) / COPIES)
    return best * 1e6


def packed(kernel: Kernel, n: int, k: int) -> Weight:
    """A random weight [n, k] in the kernel's packing."""
    param = Param("w", "w", (n, k), DTYPE, {}, lambda checkpoint, at: local)
    local = Local((Stored("none", (n, k), {"data": to_host(random(n, k))}),))
    arrays = dense_leaves(param, local) if kernel.pack is None else host_pack(kernel.pack, param, local, CPU)
    return Weight(0, "w", {}, kernel.layout, arrays)


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


def measure(rows: int, context: int, resolver: Resolver, session: Any) -> None:
    def show(op: str, problem: Problem, calls: Callable[[Kernel, Bound], Callable[[int], Any]], note: str) -> None:
        for kernel in resolver.candidates(op, problem).taken:
            call = calls(kernel, kernel.bind(problem, session))
            print(f"rows {rows:3}  {kernel.name:22} {note:14} {least_us(call):9.1f} us")

    for n, k in ((HIDDEN + 2 * KV_HEADS * DIM, HIDDEN), (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)):

        def products(kernel: Kernel, bound: Bound, n: int = n, k: int = k) -> Callable[[int], Any]:
            x, weights = random(rows, k), [packed(kernel, n, k) for _ in range(COPIES)]
            return lambda i: bound(x, weights[i])

        show("linear", LinearProblem(dtype=DTYPE, m=rows, n=n, k=k), products, f"k={k} n={n}")
    x, gated, norm = random(rows, HIDDEN), random(rows, 2 * WIDTH), NormProblem(dtype=DTYPE, width=HIDDEN, eps=1e-5)
    show("rms_norm", norm, lambda kernel, bound: lambda i: bound(x, x[0]), f"width={HIDDEN}")
    show("silu_mul", PointwiseProblem(dtype=DTYPE), lambda kernel, bound: lambda i: bound(gated), f"width={WIDTH}")
    kv = KVProblem(dtype=DTYPE, kv_dtype=DTYPE, kv_heads=KV_HEADS, qk_dim=DIM, v_dim=DIM, page_size=PAGE)
    step, q = decode_step(rows, context), random(rows, Q_HEADS, DIM)
    caches = session.alloc_caches([kv] * COPIES, [rows * -(-context // PAGE) + 1], "slots")
    attend = AttendProblem(
        dtype=DTYPE, kv_dtype=DTYPE, q_heads=Q_HEADS, kv_heads=KV_HEADS, qk_dim=DIM, v_dim=DIM, page_size=PAGE,
        scale=DIM**-0.5, tokens=rows, rows=rows, pages=step.shape.pages[0], max_query=1,
    )  # fmt: skip
    show("attend", attend, lambda kernel, bound: lambda i: bound(q, caches[i], step), f"context={context}")


@torch.inference_mode()
def main(threads: int) -> None:
    backend = create(CpuOptions(engine="torch"), World(threads=threads))
    session, resolver = backend.session(0), Resolver(backend.name, backend.kernels(), {})
    for rows, context in ((1, 128), (32, 200)):
        measure(rows, context, resolver, session)
    session.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
