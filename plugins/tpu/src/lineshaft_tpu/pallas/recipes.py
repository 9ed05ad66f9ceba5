"""This plugin's own kernels as the planner sees them: which problems they take, why not others, how they are bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.quantize import WEIGHT_SCHEMES
from lineshaft_contract.packing import pack_rows
from lineshaft_contract.problems import AttendProblem, KVProblem, LinearProblem
from lineshaft_jax.kernels.pages import LAYOUT
from lineshaft_tpu.chips import Chip
from lineshaft_tpu.pallas import attend_blocks
from lineshaft_tpu.pallas import linear as linears
from lineshaft_tpu.pallas import write_kv as writes
from lineshaft_tpu.pallas.attend import attend
from lineshaft_tpu.pallas.interpreting import Mode, parameter, watched
from lineshaft_tpu.pallas.linear import linear
from lineshaft_tpu.pallas.write_kv import write_kv
from lineshaft_tpu.tiling import (
    lanes_reason,
    memory_reason,
    padded,
    page_size_reason,
    sublanes,
    usable_smem,
    usable_vmem,
)

PRIORITY = 10
STORED = {"float32": ("float32", "bfloat16"), "bfloat16": ("bfloat16",)}
"""What pages may hold, by the dtype executed: nothing that would have to be rounded to be read."""


def pallas_kernels(backend: str, where: Chip, interpret: Mode = "") -> list[Kernel]:
    """Kernels of `attend`, `write_kv` and `linear` (of int8 and of fp8 weights) for a generation.

    `interpret`: "" compiles, "interpret" runs on the host, "races" does so and fails where a kernel has a data race.
    """
    return [
        Kernel(
            name="pallas_attend", op="attend", backend=backend, bind=partial(_bind_attend, where, interpret),
            priority=PRIORITY, layout=LAYOUT, supports=partial(attend_reason, where),
            handles=frozenset({"causal", "window", "softcap", "sinks", "value_in_key", "return_lse"}),
            options=made_for(where, interpret),
        ),
        Kernel(
            name="pallas_write_kv", op="write_kv", backend=backend, bind=partial(_bind_write, where, interpret),
            priority=PRIORITY, layout=LAYOUT, supports=partial(write_reason, where),
            options=made_for(where, interpret),
        ),
        *(_linear_kernel(backend, where, interpret, scheme) for scheme in WEIGHT_SCHEMES),
    ]  # fmt: skip


def _linear_kernel(backend: str, where: Chip, interpret: Mode, scheme: str) -> Kernel:
    return Kernel(
        name=f"pallas_linear_{scheme}", op="linear", backend=backend, bind=partial(_bind_linear, where, interpret),
        priority=PRIORITY, layout=f"{scheme}_rows", pack=pack_rows(scheme), handles=frozenset({"scheme"}),
        supports=partial(linear_reason, where, scheme), options=made_for(where, interpret),
    )  # fmt: skip


def made_for(where: Chip, interpret: Mode) -> dict[str, str]:
    """A kernel's options: another chip or way to run makes another program of the same name."""
    return {"chip": where.name, "run": interpret or "compiled"}


# ---- which problems --------------------------------------------------------------------------------------------


def attend_reason(where: Chip, problem: AttendProblem) -> str | None:
    """None, or why `attend` declines a problem on a chip."""
    return (
        _dtype_reason(problem.dtype)
        or _stored_reason(problem)
        or page_size_reason(problem.page_size, problem.kv_dtype)
        or _table_reason(where, problem)
        or _page_memory_reason(where, problem)
    )


def write_reason(where: Chip, problem: KVProblem) -> str | None:
    """None, or why `write_kv` declines a problem on a chip."""
    most = (usable_smem(where) - 1024) // 8 - writes.TOKENS
    return (
        _dtype_reason(problem.dtype)
        or _stored_reason(problem)
        or page_size_reason(problem.page_size, problem.kv_dtype)
        or memory_reason(
            f"a token of {problem.kv_heads} heads of {problem.qk_dim} and {problem.v_dim} values", "VMEM",
            writes.vmem_bytes(problem, 8), usable_vmem(where), "fewer heads a rank (a higher tp) work",
        )
        or memory_reason(
            f"a step of {problem.rows} tokens", "SMEM", 8 * problem.rows, 8 * most,
            f"the nearest that works is {most} tokens",
        )
    )  # fmt: skip


def linear_reason(where: Chip, scheme: str, problem: LinearProblem) -> str | None:
    """None, or why `linear` for weights of `scheme` declines a problem on a chip."""
    if problem.scheme != scheme:
        return f"weights of scheme {problem.scheme!r}: this kernel takes {scheme!r} alone"
    if problem.group_size:
        return f"group_size {problem.group_size}: a scale serves a whole row here; the nearest that works is 0"
    reason = _dtype_reason(problem.dtype) or lanes_reason("n", problem.n) or lanes_reason("k", problem.k)
    if reason:
        return reason
    needed = linears.vmem_bytes(problem, linears.blocks(problem, where))
    return memory_reason("a block", "VMEM", needed, usable_vmem(where), "a smaller m, n or k works")


def _dtype_reason(dtype: str) -> str | None:
    if dtype in STORED:
        return None
    return f"dtype {dtype}: this kernel computes in {' and '.join(STORED)}; the nearest that works is float32"


def _stored_reason(problem: AttendProblem | KVProblem) -> str | None:
    held = STORED[problem.dtype]
    if problem.kv_dtype in held:
        return None
    return f"kv_dtype {problem.kv_dtype} with dtype {problem.dtype}: this kernel takes pages of {' or '.join(held)}"


def _table_reason(where: Chip, problem: AttendProblem) -> str | None:
    """The page table of a step lies in SMEM whole."""
    usable, needed = usable_smem(where), attend_blocks.smem_bytes(problem)
    room = usable - (needed - 4 * problem.rows * problem.pages)
    columns = max(room // (4 * problem.rows), 1)
    size = padded(-(-problem.pages * problem.page_size // columns), sublanes(problem.kv_dtype))
    what = f"a page table of {problem.rows} rows x {problem.pages} pages of {problem.page_size} tokens"
    return memory_reason(
        what, "SMEM", needed, usable, f"the nearest that work are pages of {size} tokens or {columns} pages a row"
    )


def _page_memory_reason(where: Chip, problem: AttendProblem) -> str | None:
    """The smallest blocks must fit into VMEM."""
    rows = sublanes(problem.kv_dtype)

    def needed(page_size: int) -> int:
        sized = replace(problem, page_size=page_size)
        return attend_blocks.vmem_bytes(sized, attend_blocks.blocks(sized, where))

    usable = usable_vmem(where)
    if needed(problem.page_size) <= usable:
        return None
    fits = [size for size in range(rows, problem.page_size, rows) if needed(size) <= usable]
    fix = f"the nearest page_size that works is {fits[-1]}" if fits else "fewer query heads a key head work"
    return memory_reason(f"page_size {problem.page_size}", "VMEM", needed(problem.page_size), usable, fix)


# ---- binding ---------------------------------------------------------------------------------------------------


def _bind_attend(where: Chip, interpret: Mode, problem: AttendProblem, session: Any) -> Callable[..., Any]:
    def run(q: Any, cache: Any, step: Any, *, sinks: Any = None) -> Any:
        group = step.groups[problem.group]
        values = None if problem.value_in_key else cache.arrays["v"]
        rows = (step.query_starts, group.page_table, group.context_lens)
        pages = (cache.arrays["k"], values)
        return attend(problem, where, q, *pages, *rows, sinks=sinks, interpret=parameter(interpret))

    return watched(run, interpret)


def _bind_write(where: Chip, interpret: Mode, problem: KVProblem, session: Any) -> Callable[..., Any]:
    def store(pages: dict[str, Any], new: dict[str, Any], slots: Any) -> dict[str, Any]:
        rows = tuple(_stored(new[name], problem.kv_dtype) for name in pages)
        found = write_kv(problem, where, tuple(pages.values()), rows, slots, interpret=parameter(interpret))
        return dict(zip(pages, found, strict=True))

    checked = watched(store, interpret)

    def run(cache: Any, k: Any, v: Any, step: Any) -> Any:
        new = {"k": k} if v is None else {"k": k, "v": v}
        pages = {name: cache.arrays[name] for name in new}
        return replace(cache, arrays=checked(pages, new, step.groups[problem.group].slots))

    return run


def _stored(x: Any, kv_dtype: str) -> Any:
    """x [T, Hkv, D] as pages hold it: rounded to even, a finite value beyond the range to the largest finite one."""
    if x.dtype.name == kv_dtype:
        return x
    top = float(jnp.finfo(kv_dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -top, top), x).astype(kv_dtype)


def _bind_linear(where: Chip, interpret: Mode, problem: LinearProblem, session: Any) -> Callable[..., jax.Array]:
    def run(x: Any, w: Any) -> jax.Array:
        return linear(problem, where, x, w.arrays["q"], w.arrays["scale"], interpret=parameter(interpret))

    return watched(run, interpret)
