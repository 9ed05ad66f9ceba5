"""Paged attention over caches by slots (`native/attend.h`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_cpu.engine.caches import SLOTS
from lineshaft_cpu.engine.kernels.common import (
    Job,
    Recipe,
    TapeArray,
    c_float,
    c_int64,
    c_void_p,
    dense,
    floats_only,
    narrow,
    operand,
    recipe,
)
from lineshaft_cpu.engine.kernels.heads import same_pages, tokenwise
from lineshaft_cpu.native import Native

VECTOR, MOST_DIM = 32, 640
"""Head sizes are multiples of the one up to the other."""
ANY = 1 << 62
FEATURES = frozenset({"causal", "window", "softcap", "sinks", "value_in_key", "return_lse"})
ATTEND = Job(
    "attend",
    (
        *((name, c_int64) for name in ("q_heads", "kv_heads", "qk_dim", "v_dim", "page_size", "v_stride", "window")),
        *((name, c_int64) for name in ("causal", "narrow", "whole")), ("scale", c_float), ("softcap", c_float),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse", "sinks", "starts", "lens", "table")),
        *((name, c_int64) for name in ("rows", "tokens", "pages", "q_stride", "group", "heads", "parts", "queries")),
        ("key_heads", c_int64), ("shares", c_int64), ("live", c_void_p),
    ),
    cut=True,
)  # fmt: skip


def recipes(native: Native) -> Iterator[Recipe]:
    yield recipe("attend", "attend", bind, supports, layout=SLOTS, handles=FEATURES)


def supports(problem: AttendProblem) -> str | None:
    for dim in (problem.qk_dim, problem.v_dim):
        if dim % VECTOR or not 0 < dim <= MOST_DIM:
            return f"attends heads of a multiple of {VECTOR} up to {MOST_DIM} values, not of {dim}"
    return floats_only(problem) or same_pages(problem)


def bind(problem: AttendProblem, session: Any) -> Any:
    def attend(q: TapeArray, cache: Cache, step: StepInputs, *, sinks: Any = None) -> Any:
        """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse f32[T, Hq])."""
        tape, group = session.tape, step.groups[problem.group]
        q = tokenwise(tape, q)
        starts, lens, table = (dense(tape, x) for x in (step.query_starts, group.context_lens, group.page_table))
        out = tape.new((*q.shape[:2], problem.v_dim), problem.dtype, q.live)
        lse = tape.new(q.shape[:2], "float32", q.live) if problem.return_lse else None
        sinks = None if sinks is None else operand(sinks)
        sinks = dense(tape, sinks) if isinstance(sinks, TapeArray) else sinks
        k = cache.arrays["k"]
        fields = {
            "q_heads": problem.q_heads, "kv_heads": problem.kv_heads, "qk_dim": problem.qk_dim, "v_dim": problem.v_dim,
            "page_size": problem.page_size, "v_stride": problem.qk_dim if problem.value_in_key else problem.v_dim,
            "window": problem.window, "causal": int(problem.causal), "narrow": narrow(problem.dtype), "whole": ANY,
            "scale": problem.scale, "softcap": problem.softcap, "q": q, "k": k,
            "v": k if problem.value_in_key else cache.arrays["v"], "out": out, "lse": lse, "sinks": sinks,
            "starts": starts, "lens": lens, "table": table, "rows": table.shape[0], "tokens": q.shape[0],
            "pages": table.shape[1], "q_stride": q.strides[0], "live": q.live,
        }  # fmt: skip
        reads = [x for x in (q, starts, lens, table, sinks) if isinstance(x, TapeArray)]
        tape.add(ATTEND, "attend", reads, [out] if lse is None else [out, lse], fields)
        return out if lse is None else (out, lse)

    return attend
