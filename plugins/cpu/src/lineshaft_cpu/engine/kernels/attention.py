"""Paged attention: over pages in panels (`native/flash.h`), and over slots where those do not fit (`attend.h`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_cpu.engine.caches import PANELS, SLOTS
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
from lineshaft_cpu.engine.kernels.heads import (
    CODED,
    CODING,
    PANELLED,
    coding_of,
    pages_in_panels,
    same_pages,
    tokenwise,
)
from lineshaft_cpu.native import Native

VECTOR, MOST_DIM, MOST_VALUES, MOST_LANES = 32, 640, 256, 64
"""Head sizes are multiples of the one up to the other."""
ITEM_LANES = 48
"""Queries times heads of an item: three tiles of 16, whose sums stay in the nearest cache."""
ANY = 1 << 62
FEATURES = frozenset({"causal", "window", "softcap", "sinks", "value_in_key", "return_lse"})
ATTEND = Job(
    "attend",
    (
        *((name, c_int64) for name in ("q_heads", "kv_heads", "qk_dim", "v_dim", "page_size", "v_stride", "window")),
        *((name, c_int64) for name in ("causal", "narrow", "whole")), ("scale", c_float), ("softcap", c_float),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse", "sinks", "starts", "lens", "table")),
        *((name, c_int64) for name in ("rows", "tokens", "pages", "q_stride", "group", "heads", "parts", "queries")),
        ("key_heads", c_int64), ("shares", c_int64), ("live", c_void_p), ("held", c_int64),
    ),
    cut=True,
)  # fmt: skip

FLASH = Job(
    "flash",
    (
        *((name, c_int64) for name in ("q_heads", "kv_heads", "qk_dim", "v_dim", "page_size", "window", "causal")),
        ("narrow", c_int64), ("scale", c_float), ("softcap", c_float),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse", "sinks", "starts", "lens", "table", "live")),
        *((name, c_int64) for name in ("rows", "tokens", "pages", "q_stride", "block", "splits")),
        ("partial", c_void_p), ("held", c_int64), ("ordered", c_int64), *CODING,
    ),
)  # fmt: skip
JOIN = Job("join", FLASH.fields)


def recipes(native: Native) -> Iterator[Recipe]:
    scratch = native.value("flash_scratch", c_int64)
    yield recipe(
        "attend_panels", "attend", partial(bind_panels, scratch), panels_support, PANELLED, layout=PANELS,
        handles=FEATURES - {"value_in_key"} | CODED,
    )  # fmt: skip
    yield recipe("attend", "attend", bind, supports, layout=SLOTS, handles=FEATURES)


def panels_support(problem: AttendProblem) -> str | None:
    for dim, most in ((problem.qk_dim, MOST_DIM), (problem.v_dim, MOST_VALUES)):
        if dim % VECTOR or not 0 < dim <= most:
            return f"attends heads of a multiple of {VECTOR} up to {most} values, not of {dim}"
    if problem.q_heads // problem.kv_heads > MOST_LANES:
        return f"attends at most {MOST_LANES} query heads to a key head"
    return pages_in_panels(problem)


def bind_panels(scratch: int, problem: AttendProblem, session: Any) -> Any:
    threads, group = session.team.threads, problem.q_heads // problem.kv_heads
    alone = problem.max_query == 1
    splits = min(problem.pages, max(1, -(-2 * threads // (problem.rows * problem.kv_heads)))) if alone else 1

    def attend(q: TapeArray, cache: Cache, step: StepInputs, *, sinks: Any = None, kv_scales: Any = None) -> Any:
        """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse f32[T, Hq])."""
        tape, group_of = session.tape, step.groups[problem.group]
        q = tokenwise(tape, q)
        starts, lens, table = (dense(tape, x) for x in (step.query_starts, group_of.context_lens, group_of.page_table))
        out = tape.new((*q.shape[:2], problem.v_dim), problem.dtype, q.live)
        lse = tape.new(q.shape[:2], "float32", q.live) if problem.return_lse else None
        sinks = None if sinks is None else operand(sinks, q.dtype)
        sinks = dense(tape, sinks) if isinstance(sinks, TapeArray) else sinks
        shape = (problem.rows, problem.kv_heads, splits, group, problem.v_dim + 2)
        partial_sums = tape.new(shape, "float32") if splits > 1 else None
        coding, scales = coding_of(problem, cache, kv_scales, tape)
        fields = {
            "q_heads": problem.q_heads, "kv_heads": problem.kv_heads, "qk_dim": problem.qk_dim, "v_dim": problem.v_dim,
            "page_size": problem.page_size, "window": problem.window, "causal": int(problem.causal),
            "narrow": narrow(problem.dtype), "scale": problem.scale, "softcap": problem.softcap, "q": q,
            "k": cache.arrays["k"], "v": cache.arrays["v"], "out": out, "lse": lse, "sinks": sinks, "starts": starts,
            "lens": lens, "table": table, "live": q.live, "rows": table.shape[0], "tokens": q.shape[0],
            "pages": table.shape[1], "q_stride": q.strides[0], "block": 1 if alone else max(1, ITEM_LANES // group),
            "splits": splits, "partial": partial_sums, "held": cache.arrays["k"].shape[0], "ordered": 0,
            **coding,
        }  # fmt: skip
        reads = [x for x in (q, starts, lens, table, sinks, *scales) if isinstance(x, TapeArray)]
        outs = [x for x in (out, lse) if x is not None]
        if partial_sums is None:
            tape.add(FLASH, "attend", reads, outs, fields, scratch)
        else:
            tape.add(FLASH, "attend", reads, [*outs, partial_sums], fields, scratch)
            tape.add(JOIN, "attend", [*reads, partial_sums], outs, fields)
        return out if lse is None else (out, lse)

    return attend


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
        sinks = None if sinks is None else operand(sinks, q.dtype)
        sinks = dense(tape, sinks) if isinstance(sinks, TapeArray) else sinks
        k = cache.arrays["k"]
        fields = {
            "q_heads": problem.q_heads, "kv_heads": problem.kv_heads, "qk_dim": problem.qk_dim, "v_dim": problem.v_dim,
            "page_size": problem.page_size, "v_stride": problem.qk_dim if problem.value_in_key else problem.v_dim,
            "window": problem.window, "causal": int(problem.causal), "narrow": narrow(problem.dtype), "whole": ANY,
            "scale": problem.scale, "softcap": problem.softcap, "q": q, "k": k,
            "v": k if problem.value_in_key else cache.arrays["v"], "out": out, "lse": lse, "sinks": sinks,
            "starts": starts, "lens": lens, "table": table, "rows": table.shape[0], "tokens": q.shape[0],
            "pages": table.shape[1], "q_stride": q.strides[0], "live": q.live, "held": k.shape[0],
        }  # fmt: skip
        reads = [x for x in (q, starts, lens, table, sinks) if isinstance(x, TapeArray)]
        tape.add(ATTEND, "attend", reads, [out] if lse is None else [out, lse], fields)
        return out if lse is None else (out, lse)

    return attend
