"""Products with one weight of several: per head, and per expert with the routing around it (`native/experts.h`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import ExpertProblem, LinearProblem, RouterProblem, itemsize
from lineshaft_contract.schemes import check_parts, dequantize
from lineshaft_contract.weights import Local, Param, Weight
from lineshaft_cpu.engine.kernels.choice import WIDEST
from lineshaft_cpu.engine.kernels.common import (
    EXTENT,
    Field,
    Job,
    Recipe,
    TapeArray,
    c_double,
    c_float,
    c_int64,
    c_void_p,
    copied,
    dense,
    extent,
    floats_only,
    grain,
    live_of,
    narrow,
    operand,
    recipe,
    tail_of,
)
from lineshaft_cpu.engine.kernels.products import ITEM_BYTES, LINEAR, PANELS, rows_of_item
from lineshaft_cpu.engine.stored import PANEL
from lineshaft_cpu.native import Native

HEADS = Job("heads", (*LINEAR.fields, *((name, c_int64) for name in ("heads", "panel_bytes", "x_step", "out_step"))))
ROUTER = Job(
    "router",
    (
        *EXTENT, ("grain", c_int64), ("x", c_void_p), ("ids", c_void_p), ("probs", c_void_p),
        *((name, c_int64) for name in ("experts", "k", "stride", "groups", "group_top", "narrow")),
        ("after", c_int64), ("renormalise", c_int64), ("scale", c_double),
    ),
)  # fmt: skip
SORT = Job(
    "sort",
    (*EXTENT, *((name, c_void_p) for name in ("ids", "map", "offsets", "source")), ("k", c_int64), ("local", c_int64)),
)
SPREAD = Job(
    "spread",
    (
        *EXTENT, ("grain", c_int64), *((name, c_void_p) for name in ("x", "out", "source", "end")), ("k", c_int64),
        ("bytes", c_int64), ("stride", c_int64),
    ),
)  # fmt: skip
EXPERTS = Job(
    "experts",
    (
        *LINEAR.fields, ("offsets", c_void_p),
        *((name, c_int64) for name in ("experts", "panel_bytes", "bias_step", "activation")), ("alpha", c_float),
        ("limit", c_float),
    ),
)  # fmt: skip
INVERT = Job("invert", (*EXTENT, ("grain", c_int64), ("source", c_void_p), ("place", c_void_p)))
COMBINE = Job(
    "combine",
    (
        *EXTENT, ("grain", c_int64), *((name, c_void_p) for name in ("x", "place", "probs", "out")),
        *((name, c_int64) for name in ("k", "width", "stride", "narrow")),
    ),
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "swigluoai")
"""In the order of experts.h."""
NUMBERS = frozenset({"bias", "swiglu_alpha", "swiglu_limit"})


def recipes(native: Native) -> Iterator[Recipe]:
    yield recipe("head_linear", "head_linear", bind_heads, layout=PANELS, pack=pack_stack, handles=frozenset({"heads"}))
    yield recipe("router_topk", "router_topk", bind_router, handles=frozenset({"groups"}))
    yield recipe("moe_dispatch", "moe_dispatch", bind_dispatch, supports=lambda problem: None)
    yield recipe(
        "grouped_mlp", "grouped_mlp", bind_experts, mlp_supports, layout=PANELS, pack=pack_stack, handles=NUMBERS
    )
    yield recipe("moe_combine", "moe_combine", bind_combine)


def mlp_supports(problem: ExpertProblem) -> str | None:
    if problem.activation not in ACTIVATIONS:
        return f"knows the activations {', '.join(ACTIVATIONS)}, not {problem.activation}"
    return floats_only(problem)


def pack_stack(param: Param, local: Local) -> dict[str, HostArray]:
    """{"data": each matrix of a stack [..., n, k] in panels, as of `panels_of`}. Gate and up of w13 have panels
    each of their own: [L, 2, n / 2, k]."""
    check_parts(param, local)
    *lead, n, k = param.shape
    problem = param.problems.get("experts")
    gated = isinstance(problem, ExpertProblem) and (n, k) == (2 * problem.width, problem.hidden)
    parts = (2, n // 2, k) if gated else (1, n, k)
    stack = np.stack([panels_of(matrix.reshape(parts)) for matrix in matrices(param, local)])
    return {"data": stack.reshape(*lead, *stack.shape[1:])}


def panels_of(whole: HostArray) -> HostArray:
    """Weights [..., n, k] in panels of 32 outputs: bfloat16 [..., n / 32, k / 2, 32, 2], float32
    [..., n / 32, k, 32, 1], zeros where they end."""
    *lead, n, k = whole.shape
    pair = 2 if whole.dtype.itemsize == 2 else 1
    if n % PANEL or k % pair:
        whole = np.pad(whole, (*((0, 0) for _ in lead), (0, -n % PANEL), (0, -k % pair)))
    bits = whole.view(np.uint16 if pair == 2 else np.uint32)
    panels = bits.reshape(*lead, -1, PANEL, whole.shape[-1] // pair, pair).swapaxes(-3, -2)
    return np.ascontiguousarray(panels).view(whole.dtype)


def matrices(param: Param, local: Local) -> Iterator[HostArray]:
    """The matrices [n, k] of a stack, whose parts may be stacks, matrices, or parts of those."""
    n, k = param.shape[-2:]
    rows: HostArray | None = None
    for part in local.parts:
        more = dequantize(part, param.dtype).reshape(-1, k)
        rows = more if rows is None or not len(rows) else np.concatenate([rows, more])
        while len(rows) >= n:
            yield rows[:n]
            rows = rows[n:]


def of_linear(x: TapeArray, out: TapeArray, data: HostArray, n: int, k: int, threads: int) -> dict[str, Field]:
    """The fields of a product of the rows of x with the first of several packed weights [n, k]."""
    units = -(-n // PANEL)
    most = max(1, ITEM_BYTES // (PANEL * k * itemsize(x.dtype)))
    return {
        **extent(x, x.shape[0]), "x": x, "panels": data, "bias": None, "out": out, "n": n, "k": k,
        "x_stride": x.strides[0], "out_stride": out.strides[0], "gate": 0, "block": rows_of_item(k, x.dtype),
        "grain": min(-(-units // threads), most), "narrow": narrow(x.dtype), "panel_bytes": data[0].nbytes,
    }  # fmt: skip


def bind_heads(problem: LinearProblem, session: Any) -> Any:
    def head_linear(x: TapeArray, w: Weight) -> TapeArray:
        """x [T, H, I], w [H, O, I] in panels -> head h of x times w[h]^T [T, H, O]."""
        tape, heads = session.tape, problem.heads
        x = x if tail_of(x) >= problem.k else copied(tape, x)
        out = tape.new((x.shape[0], heads, problem.n), x.dtype, x.live)
        fields = {
            **of_linear(x, out, w.arrays["data"], problem.n, problem.k, session.team.threads), "heads": heads,
            "x_step": x.strides[1], "out_step": problem.n,
        }  # fmt: skip
        tape.add(HEADS, "head_linear", (x,), (out,), fields)
        return out

    return head_linear


def bind_router(problem: RouterProblem, session: Any) -> Any:
    def router_topk(logits: TapeArray) -> tuple[TapeArray, TapeArray]:
        """logits [T, E] -> (ids int32[T, k], probs f32[T, k]), descending, ties to the lowest id."""
        tape, (rows, experts) = session.tape, logits.shape
        x = logits if tail_of(logits) >= experts else copied(tape, logits)
        ids, probs = (tape.new((rows, problem.k), dtype, x.live) for dtype in ("int32", "float32"))
        fields = {
            **extent(x, rows), "grain": grain(experts * 16), "x": x, "ids": ids, "probs": probs, "experts": experts,
            "k": problem.k, "stride": x.strides[0], "groups": problem.groups, "group_top": problem.group_top,
            "narrow": narrow(x.dtype), "after": int(problem.softmax == "after"),
            "renormalise": int(problem.renormalise), "scale": problem.scale,
        }  # fmt: skip
        scratch = 4 * (experts + WIDEST + problem.k + 3 * problem.groups)
        tape.add(ROUTER, "router_topk", (x,), (ids, probs), fields, scratch)
        return ids, probs

    return router_topk


def bind_dispatch(problem: ExpertProblem, session: Any) -> Any:
    def moe_dispatch(
        x: TapeArray, ids: TapeArray, expert_map: TapeArray, local: int
    ) -> tuple[TapeArray, TapeArray, TapeArray]:
        """x [T, H], ids int32[T, k], expert_map int32[E] -> (rows of x by local expert [T * k, H], offsets
        int32[local + 1], source int32[T * k]); those of padding tokens are zeros, behind all others."""
        tape, (tokens, k), width = session.tape, ids.shape, x.shape[1]
        x = x if tail_of(x) >= width else copied(tape, x)
        ids, mapping = dense(tape, ids), dense(tape, expert_map)
        live = live_of(x, ids)
        rows = tape.new((tokens * k, width), x.dtype)
        offsets, source = tape.new((local + 1,), "int32"), tape.new((tokens * k,), "int32")
        fields: dict[str, Field] = {
            "live": live, "rows": tokens, "times": 1, "ids": ids, "map": mapping, "offsets": offsets, "source": source,
            "k": k, "local": local,
        }  # fmt: skip
        tape.add(SORT, "moe_dispatch", (ids, mapping), (offsets, source), fields)
        fields = {
            **extent(rows, tokens * k), "grain": grain(width), "x": x, "out": rows, "source": source,
            "end": offsets[local : local + 1], "k": k, "bytes": width * x.itemsize, "stride": x.row_bytes(),
        }  # fmt: skip
        tape.add(SPREAD, "moe_dispatch", (x, source, offsets), (rows,), fields)
        return rows, offsets, source

    return moe_dispatch


def bind_experts(problem: ExpertProblem, session: Any) -> Any:
    def grouped_mlp(
        x: TapeArray, w13: Weight, w2: Weight, offsets: TapeArray, *, w13_bias: Any = None, w2_bias: Any = None
    ) -> TapeArray:
        """x [C, H], w13 [L, 2F, H] and w2 [L, H, F] in panels, offsets int32[L + 1], biases [L, 2F] and [L, H] -> each
        expert's gated MLP of its rows [C, H]; the hidden activation is rounded."""
        tape, threads, width, hidden = session.tape, session.team.threads, problem.width, problem.hidden
        x = x if tail_of(x) >= hidden else copied(tape, x)
        offsets = dense(tape, offsets)
        between, out = (tape.new((x.shape[0], n), x.dtype) for n in (width, hidden))
        shared = {
            "live": None, "offsets": offsets, "experts": problem.local, "alpha": problem.swiglu_alpha,
            "activation": ACTIVATIONS.index(problem.activation), "limit": problem.swiglu_limit,
        }  # fmt: skip
        for given, made, weight, bias, n, k, gate in (
            (x, between, w13, w13_bias, width, hidden, width), (between, out, w2, w2_bias, hidden, width, 0)
        ):  # fmt: skip
            added = None if bias is None else operand(bias, x.dtype)
            added = dense(tape, added) if isinstance(added, TapeArray) else added
            fields = of_linear(given, made, weight.arrays["data"], n, k, threads) | shared
            fields |= {"bias": added, "bias_step": 2 * n if gate else n, "gate": gate}
            reads = [array for array in (given, offsets, added) if isinstance(array, TapeArray)]
            tape.add(EXPERTS, "grouped_mlp", reads, (made,), fields)
        return out

    return grouped_mlp


def bind_combine(problem: ExpertProblem, session: Any) -> Any:
    def moe_combine(rows: TapeArray, source: TapeArray, probs: TapeArray) -> TapeArray:
        """rows [T * k, H], source int32[T * k], probs f32[T, k] -> the sum of each token's rows by their weights
        [T, H]."""
        tape, (tokens, k), width = session.tape, probs.shape, rows.shape[1]
        x = rows if tail_of(rows) >= width else copied(tape, rows)
        source, probs = dense(tape, source), dense(tape, probs)
        place, out = tape.new((tokens * k,), "int32"), tape.new((tokens, width), x.dtype, probs.live)
        fields: dict[str, Field] = {
            **extent(place, tokens * k), "grain": grain(1), "source": source, "place": place
        }  # fmt: skip
        tape.add(INVERT, "moe_combine", (source,), (place,), fields)
        fields = {
            **extent(out, tokens), "grain": grain(k * width), "x": x, "place": place, "probs": probs, "out": out,
            "k": k, "width": width, "stride": x.strides[0], "narrow": narrow(x.dtype),
        }  # fmt: skip
        tape.add(COMBINE, "moe_combine", (x, place, probs), (out,), fields)
        return out

    return moe_combine
