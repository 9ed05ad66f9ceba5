"""Cases without values: operands that fit a problem, as zeros that take no memory, for programs that never run.

For problems of real models, of which no OpSpec has a case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lineshaft_conformance.harness.op_case import cache_problem
from lineshaft_contract.ops import Case
from lineshaft_contract.ops.checks import wide
from lineshaft_contract.ops.logits import EDITS
from lineshaft_contract.ops.spec import CacheArg, StepArg, WeightArg, numpy_dtype
from lineshaft_contract.problems import (
    AttendProblem,
    EmbedProblem,
    ExpertProblem,
    KVProblem,
    LinearProblem,
    MergeProblem,
    NormProblem,
    PointwiseProblem,
    Problem,
    RopeProblem,
    RopeWriteProblem,
    RouterProblem,
    SampleProblem,
)
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import StepShape, forward_inputs

Operands = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of an op by position and by keyword."""
POOL = 256
"""Pages of a cache that is only written, beside those of its tokens."""


def zero_case(op: str, problem: Problem) -> Case | None:
    """A case of the problem, in the executed dtype; None for an op whose operands are not made here."""
    make = MAKERS.get(op)
    if make is None:
        return None
    args, kwargs = make(problem)
    return Case("zeros", problem, args, kwargs)


def zeros(dtype: str, *shape: int) -> HostArray:
    """Zeros that all lie at one place."""
    return np.broadcast_to(np.zeros((), numpy_dtype(dtype)), shape)


def step(shape: StepShape, group: int, *, page_starts: bool = False) -> StepArg:
    """The empty step of a shape."""
    layout = forward_inputs(shape, frozenset({group} if page_starts else ()))
    return StepArg({item.name: zeros(item.dtype, *item.shape) for item in layout.fields}, shape)


def pages(problem: KVProblem, count: int) -> CacheArg:
    """A cache of `count` pages, the null page among them."""
    return CacheArg({name: zeros(dtype, count, *shape) for name, (shape, dtype) in problem.page_arrays.items()})


def kv_scales(problem: KVProblem | AttendProblem) -> dict[str, HostArray]:
    if problem.kv_scheme == "none":
        return {}
    return {"kv_scales": zeros("float32", 2, *([problem.kv_heads] if problem.kv_scheme == "head" else []))}


def attend(p: AttendProblem) -> Operands:
    shape = StepShape(p.tokens, p.rows, (p.pages,) * (p.group + 1), p.rows, p.max_query)
    cache = pages(cache_problem(p), 1 + p.rows * p.pages)
    given = kv_scales(p)
    if p.sinks:
        given["sinks"] = zeros(p.dtype, p.q_heads)
    if p.key_ranges:
        given["key_ranges"] = zeros("int32", p.tokens, 2)
    if p.ancestors:
        given["ancestors"] = zeros("uint32", p.tokens, -(-p.max_query // 32))
    q = zeros(p.dtype, p.tokens, p.q_heads, p.qk_dim)
    return (q, cache, step(shape, p.group, page_starts=p.page_starts)), given


def write_kv(p: KVProblem) -> Operands:
    own = -(-p.rows // p.page_size)
    shape = StepShape(p.rows, 1, (own,) * (p.group + 1), 1, p.rows)
    k, v = (zeros(p.dtype, p.rows, p.kv_heads, dim) if dim else None for dim in (p.qk_dim, p.v_dim))
    return (pages(p, own + POOL), k, v, step(shape, p.group)), kv_scales(p)


def rope_write_kv(p: RopeWriteProblem) -> Operands:
    (cache, k, v, given), _ = write_kv(p.kv)
    return (cache, zeros(p.dtype, p.rows, p.q_heads, p.head_dim), k, v, zeros("int32", p.rows), given), {}


def linear(p: LinearProblem) -> Operands:
    weight = WeightArg(zeros(p.dtype, p.n, p.k), "linear")
    return (zeros(p.dtype, p.m, p.k), weight), {"bias": zeros(p.dtype, p.n)} if p.bias else {}


def head_linear(p: LinearProblem) -> Operands:
    return (zeros(p.dtype, p.m, p.heads, p.k), WeightArg(zeros(p.dtype, p.heads, p.n, p.k), "linear")), {}


def rms_norm(p: NormProblem) -> Operands:
    return (zeros(p.dtype, p.rows, p.width), WeightArg(zeros(p.dtype, p.width), "norm")), {}


def add_rms_norm(p: NormProblem) -> Operands:
    x = zeros(p.dtype, p.rows, p.width)
    return (x, x, WeightArg(zeros(p.dtype, p.width), "norm")), {}


def rope(p: RopeProblem) -> Operands:
    q, k = (zeros(p.dtype, p.rows, heads, p.head_dim) for heads in (p.q_heads, p.kv_heads))
    return (q, k, zeros("int32", p.rows)), {}


def add(p: PointwiseProblem) -> Operands:
    return (zeros(p.dtype, p.rows, p.width), zeros(p.dtype, p.rows, p.width)), {}


def gated(p: PointwiseProblem) -> Operands:
    return (zeros(p.dtype, p.rows, 2 * p.width),), {}


def embed(p: EmbedProblem) -> Operands:
    table = WeightArg(zeros(p.dtype, p.vocab, p.width), "embed")
    return (zeros("int32", p.rows), table, zeros("int32", 1)), {}


def gather_rows(p: PointwiseProblem) -> Operands:
    return (zeros(p.dtype, max(1, p.rows), p.width), zeros("int32", p.rows)), {}


def merge_rows(p: PointwiseProblem) -> Operands:
    return (zeros(p.dtype, p.rows, p.width), zeros(p.dtype, 1, p.width), zeros("int32", p.rows)), {}


def merge_states(p: MergeProblem) -> Operands:
    lead = (p.parts, p.rows, p.heads)
    given = {"sinks": zeros(p.dtype, p.heads)} if p.sinks else {}
    return (zeros(p.dtype, *lead, p.v_dim), zeros(wide(p.dtype), *lead)), given


def router_topk(p: RouterProblem) -> Operands:
    return (zeros(p.dtype, p.rows, p.experts),), {}


def experts(p: ExpertProblem) -> tuple[tuple[WeightArg, WeightArg], dict[str, HostArray]]:
    """w13 and w2, and their biases."""
    sizes = {"w13": (2 * p.width, p.hidden), "w2": (p.hidden, p.width)}
    w13, w2 = (WeightArg(zeros(p.dtype, p.local, *size), "experts") for size in sizes.values())
    biases = {f"{name}_bias": zeros(p.dtype, p.local, size[0]) for name, size in sizes.items()}
    return (w13, w2), biases if p.bias else {}


def expert_mlp(p: ExpertProblem) -> Operands:
    weights, given = experts(p)
    ids, probs = zeros("int32", p.rows, p.k), zeros(wide(p.dtype), p.rows, p.k)
    return (zeros(p.dtype, p.rows, p.hidden), ids, probs, *weights, zeros("int32", p.experts)), given


def grouped_mlp(p: ExpertProblem) -> Operands:
    weights, given = experts(p)
    return (zeros(p.dtype, p.rows, p.hidden), *weights, zeros("int32", p.local + 1)), given


def moe_dispatch(p: ExpertProblem) -> Operands:
    ids, mapping = zeros("int32", p.rows, p.k), zeros("int32", p.experts)
    return (zeros(p.dtype, p.rows, p.hidden), ids, mapping, p.local), {}


def moe_combine(p: ExpertProblem) -> Operands:
    capacity = p.rows * p.k
    return (zeros(p.dtype, capacity, p.hidden), zeros("int32", capacity), zeros(wide(p.dtype), p.rows, p.k)), {}


def argmax(p: SampleProblem) -> Operands:
    return (zeros(p.dtype, p.rows, p.vocab),), {}


def logprobs(p: SampleProblem) -> Operands:
    return (zeros(p.dtype, p.rows, p.vocab), zeros("int32", p.rows), p.top), {}


def sample(p: SampleProblem) -> Operands:
    names = ("temperature", "top_p", "min_p", *(("typical_p",) if p.typical else ()))
    params = {name: zeros("float32", p.rows) for name in names} | {"top_k": zeros("int32", p.rows)}
    return (zeros(p.dtype, p.rows, p.vocab), params, zeros("float32", p.rows, 1)), {}


def apply_logits(p: SampleProblem) -> Operands:
    given = {"mask": zeros("uint32", p.rows, -(-p.vocab // 32))} if p.mask else {}
    if p.edits:
        given |= {name: zeros("int32" if name == "edit_ids" else "float32", p.rows, p.edits) for name in EDITS}
    return (zeros(p.dtype, p.rows, p.vocab),), given


def copies(p: KVProblem) -> Operands:
    """Pages or slots from some to others."""
    return (pages(p, 1 + POOL), zeros("int32", p.rows), zeros("int32", p.rows)), {}


def read_pages(p: KVProblem) -> Operands:
    return (pages(p, 1 + POOL), zeros("int32", p.rows)), {}


def write_pages(p: KVProblem) -> Operands:
    given = {name: zeros(dtype, p.rows, *shape) for name, (shape, dtype) in p.page_arrays.items()}
    return (pages(p, 1 + POOL), zeros("int32", p.rows), given), {}


MAKERS: Mapping[str, Callable[[Any], Operands]] = {
    "attend": attend, "write_kv": write_kv, "rope_write_kv": rope_write_kv, "linear": linear,
    "head_linear": head_linear, "rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "rope": rope, "add": add,
    "silu_mul": gated, "gelu_mul": gated, "embed": embed, "gather_rows": gather_rows, "merge_rows": merge_rows,
    "merge_states": merge_states, "router_topk": router_topk, "expert_mlp": expert_mlp, "grouped_mlp": grouped_mlp,
    "moe_dispatch": moe_dispatch, "moe_combine": moe_combine, "argmax": argmax, "logprobs": logprobs,
    "sample": sample, "apply_logits": apply_logits, "read_pages": read_pages, "write_pages": write_pages,
    "copy_pages": copies, "copy_slots": copies,
}  # fmt: skip
"""Who makes the operands of an op's problem."""
