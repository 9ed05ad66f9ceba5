"""Row-wise kernels: lookups, sums, norms and gates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lineshaft_contract.problems import EmbedProblem, MergeProblem, NormProblem, PointwiseProblem
from lineshaft_contract.weights import Weight
from lineshaft_cpu.engine.kernels.common import (
    DENSE,
    DTYPES,
    EXTENT,
    LOOKUP,
    Job,
    Recipe,
    TapeArray,
    c_float,
    c_int,
    c_int64,
    c_void_p,
    copied,
    dense,
    extent,
    grain,
    lead_of,
    live_of,
    lookup,
    narrow,
    operand,
    recipe,
    tail_of,
)
from lineshaft_cpu.native import Native

_ROWS = (*EXTENT, ("grain", c_int64))
NORM = Job(
    "norm",
    (
        *_ROWS, *((name, c_void_p) for name in ("x", "residual", "weight", "out", "total")),
        *((name, c_int64) for name in ("width", "x_stride", "residual_stride", "inner", "inner_stride")),
        ("eps", c_float), ("narrow", c_int), ("ordered", c_int64),
    ),
)  # fmt: skip
GATE = Job(
    "gate",
    (
        *_ROWS, ("x", c_void_p), ("out", c_void_p), ("width", c_int64), ("stride", c_int64), ("narrow", c_int),
        ("gelu", c_int),
    ),
)  # fmt: skip
MERGE = Job(
    "merge",
    (
        *_ROWS, *((name, c_void_p) for name in ("x", "others", "out", "source")),
        *((name, c_int64) for name in ("count", "bytes", "x_stride", "others_stride")),
    ),
)  # fmt: skip
STATES = Job(
    "states",
    (
        *_ROWS, *((name, c_void_p) for name in ("x", "lse", "sinks", "out")),
        *((name, c_int64) for name in ("parts", "heads", "width", "narrow", "narrow_sinks")),
    ),
)  # fmt: skip
ADD = Job(
    "add",
    (*_ROWS, ("x", c_void_p), ("y", c_void_p), ("out", c_void_p), ("width", c_int64), ("narrow", c_int64)),
)


def recipes(native: Native) -> Iterator[Recipe]:
    yield recipe("rms_norm", "rms_norm", bind_norm, layout=DENSE)
    yield recipe("add_rms_norm", "add_rms_norm", bind_add_norm, layout=DENSE)
    yield recipe("silu_mul", "silu_mul", partial(bind_gate, "silu_mul"))
    yield recipe("gelu_mul", "gelu_mul", partial(bind_gate, "gelu_mul"))
    yield recipe("add", "add", bind_add)
    yield recipe("concat", "concat", bind_concat, supports=lambda problem: None)
    yield recipe("gather_rows", "gather_rows", bind_gather, supports=lambda problem: None)
    yield recipe("merge_rows", "merge_rows", bind_merge, supports=lambda problem: None)
    yield recipe("merge_states", "merge_states", bind_states, handles=frozenset({"sinks"}))
    yield recipe("embed", "embed", bind_embed, layout=DENSE, handles=frozenset({"scale"}))


def bind_norm(problem: NormProblem, session: Any) -> Any:
    def rms_norm(x: TapeArray, w: Weight) -> TapeArray:
        """x [..., W], w [W] -> x / sqrt(mean(x^2) + eps) * w, rounded once."""
        tape = session.tape
        lead = lead_of(x, problem.width) if tail_of(x) >= problem.width else None
        if lead is None:
            x = copied(tape, x)
            lead = (problem.width, 1, 0)
        out = tape.new(x.shape, x.dtype, x.live)
        rows = x.size // problem.width
        fields = {
            **extent(x, rows), "grain": grain(problem.width), "x": x, "residual": None, "weight": operand(w, x.dtype),
            "out": out, "total": None, "width": problem.width, "x_stride": lead[0], "residual_stride": 0,
            "inner": lead[1], "inner_stride": lead[2], "eps": problem.eps, "narrow": narrow(x.dtype), "ordered": 0,
        }  # fmt: skip
        tape.add(NORM, "rms_norm", (x,), (out,), fields)
        return out

    return rms_norm


def bind_add_norm(problem: NormProblem, session: Any) -> Any:
    def add_rms_norm(x: TapeArray, r: TapeArray, w: Weight) -> tuple[TapeArray, TapeArray]:
        """x, r [..., W] -> (rms_norm(x + r), x + r); the sum is rounded before it is normed."""
        tape, width = session.tape, problem.width
        x, r = dense(tape, x), dense(tape, r)
        out, total = (tape.new(x.shape, x.dtype, live_of(x, r)) for _ in range(2))
        fields = {
            **extent(out, x.size // width), "grain": grain(width), "x": x, "residual": r, "weight": operand(w, x.dtype),
            "out": out, "total": total, "width": width, "x_stride": width, "residual_stride": width, "inner": 1,
            "inner_stride": 0, "eps": problem.eps, "narrow": narrow(x.dtype), "ordered": 0,
        }  # fmt: skip
        tape.add(NORM, "add_rms_norm", (x, r), (out, total), fields)
        return out, total

    return add_rms_norm


def bind_gate(op: str, problem: PointwiseProblem, session: Any) -> Any:
    def gate(x: TapeArray) -> TapeArray:
        """x [T, 2F], gate first -> silu(gate) * up [T, F], or gelu(gate) * up."""
        tape, (rows, both) = session.tape, x.shape
        x = x if tail_of(x) >= both else copied(tape, x)
        out = tape.new((rows, both // 2), x.dtype, x.live)
        fields = {
            **extent(x, rows), "grain": grain(both), "x": x, "out": out, "width": both // 2, "stride": x.strides[0],
            "narrow": narrow(x.dtype), "gelu": int(op == "gelu_mul"),
        }  # fmt: skip
        tape.add(GATE, op, (x,), (out,), fields)
        return out

    return gate


def bind_add(problem: PointwiseProblem, session: Any) -> Any:
    def add(x: TapeArray, y: TapeArray) -> TapeArray:
        """x + y, of equal shapes."""
        tape = session.tape
        x, y = dense(tape, x), dense(tape, y)
        out = tape.new(x.shape, x.dtype, live_of(x, y))
        width = x.size // max(1, x.shape[0])
        fields = {
            **extent(out, x.shape[0]), "grain": grain(width), "x": x, "y": y, "out": out, "width": width,
            "narrow": narrow(x.dtype),
        }  # fmt: skip
        tape.add(ADD, "add", (x, y), (out,), fields)
        return out

    return add


def bind_concat(problem: PointwiseProblem, session: Any) -> Any:
    def concat(xs: Sequence[TapeArray], dim: int) -> TapeArray:
        """Arrays that agree in every dim but `dim`, joined along it."""
        shape = list(xs[0].shape)
        shape[dim] = sum(x.shape[dim] for x in xs)
        live = live_of(*xs) if dim else None
        out = session.tape.new(shape, xs[0].dtype, live)
        start = 0
        for x in xs:
            place = [slice(None)] * dim + [slice(start, start + x.shape[dim])]
            copied(session.tape, x, out[tuple(place)])
            start += x.shape[dim]
        return out

    return concat


def bind_gather(problem: PointwiseProblem, session: Any) -> Any:
    def gather_rows(x: TapeArray, rows: TapeArray) -> TapeArray:
        """x [T, H], rows int32[R] -> x[rows] [R, H]."""
        return look_up(session.tape, "gather_rows", x, rows, x.row_bytes() if len_of(x) > 1 else 0)

    return gather_rows


def bind_merge(problem: PointwiseProblem, session: Any) -> Any:
    def merge_rows(x: TapeArray, embeds: TapeArray, source: TapeArray) -> TapeArray:
        """x [T, H], embeds [M, H], source int32[T] -> embeds[source[t]] where that is 0 or more, else x[t]."""
        tape, width = session.tape, x.shape[1]
        x, others = (y if tail_of(y) >= width else copied(tape, y) for y in (x, embeds))
        source = dense(tape, source)
        out = tape.new(x.shape, x.dtype, live_of(x, source))
        fields = {
            **extent(out, x.shape[0]), "grain": grain(width), "x": x, "others": others, "out": out, "source": source,
            "count": others.shape[0], "bytes": width * x.itemsize, "x_stride": x.row_bytes(),
            "others_stride": others.row_bytes(),
        }  # fmt: skip
        tape.add(MERGE, "merge_rows", (x, others, source), (out,), fields)
        return out

    return merge_rows


def bind_states(problem: MergeProblem, session: Any) -> Any:
    def merge_states(out: TapeArray, lse: TapeArray, *, sinks: Any = None) -> TapeArray:
        """out [n, T, H, D], lse f32[n, T, H], sinks [H] -> attention over all keys [T, H, D]."""
        tape, (parts, *shape) = session.tape, out.shape
        x, lse = dense(tape, out), dense(tape, lse)
        given = None if sinks is None else operand(sinks, *DTYPES)
        if isinstance(given, TapeArray):
            given = dense(tape, given)
        merged = tape.new(shape, x.dtype)
        fields = {
            "live": None, "rows": shape[0] * shape[1], "times": 1, "grain": grain(parts * shape[2]), "x": x, "lse": lse,
            "sinks": given, "out": merged, "parts": parts, "heads": shape[1], "width": shape[2],
            "narrow": narrow(x.dtype), "narrow_sinks": narrow(str(given.dtype)) if given is not None else 0,
        }  # fmt: skip
        reads = [y for y in (x, lse, given) if isinstance(y, TapeArray)]
        tape.add(STATES, "merge_states", reads, (merged,), fields, 4 * parts)
        return merged

    return merge_states


def bind_embed(problem: EmbedProblem, session: Any) -> Any:
    def embed(ids: TapeArray, table: Weight, vocab_start: TapeArray) -> TapeArray:
        """Rows ids - vocab_start of the table [V, H] times `scale`, zeros outside of it -> [T, H]."""
        data = table.arrays["data"]
        return look_up(
            session.tape, "embed", data, ids, data.strides[0], dtype=problem.dtype, first=vocab_start,
            scaled=int(problem.scale != 1.0), narrow=narrow(problem.dtype), scale=problem.scale,
        )  # fmt: skip

    return embed


def len_of(x: TapeArray) -> int:
    return x.shape[0]


def look_up(tape: Any, op: str, x: Any, index: TapeArray, stride: int, dtype: str = "", **more: Any) -> TapeArray:
    """Rows of x [N, ...], `stride` bytes apart, by an index int32[R] -> [R, ...]."""
    index = dense(tape, index)
    if isinstance(x, TapeArray) and tail_of(x) < x.size // max(1, x.shape[0]):
        x = copied(tape, x)
        stride = x.row_bytes()
    out = tape.new((index.shape[0], *x.shape[1:]), dtype or x.dtype, index.live)
    nbytes = math.prod(x.shape[1:]) * out.itemsize
    fields = lookup(x, out, index.shape[0], nbytes, nbytes)
    fields |= {"live": index.live, "index": index, "count": x.shape[0], "from_stride": stride, **more}
    reads = (index, *(item for item in (x, more.get("first")) if isinstance(item, TapeArray)))
    tape.add(LOOKUP, op, reads, (out,), fields)
    return out
