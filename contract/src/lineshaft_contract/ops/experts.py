"""Mixture of experts: `router_topk`, the composite `expert_mlp`, and its parts `moe_dispatch`, `grouped_mlp`,
`moe_combine`, whose capacity is static and lossless: T * k rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import seeded, short, variants
from lineshaft_contract.ops.checks import base_problem, expect, refuse, weight_problem, wide
from lineshaft_contract.ops.linear import cancel
from lineshaft_contract.ops.pointwise import gelu, silu
from lineshaft_contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance, WeightArg
from lineshaft_contract.problems import ExpertProblem, RouterProblem, itemsize
from lineshaft_contract.steps import ArraySpec

Triple = tuple[HostArray, HostArray, HostArray]
_BIASES = {"w13_bias": "bias", "w2_bias": "bias"}


def specs() -> tuple[OpSpec, ...]:
    return (_router_spec(), _expert_mlp_spec(), _grouped_mlp_spec(), _dispatch_spec(), _combine_spec())


def _router_spec() -> OpSpec:
    return OpSpec(
        name="router_topk",
        signature="router_topk(logits [T, E]) -> (ids int32[T, k], probs f32[T, k]); descending, ties to the lowest id",
        problem=RouterProblem,
        specialise=_specialise_router,
        infer=lambda p, call: (ArraySpec((p.rows, p.k), "int32"), ArraySpec((p.rows, p.k), wide(p.dtype))),
        reference=router_topk,
        cases=_router_cases,
        tolerance=Tolerance(depth=lambda p: p.experts),
        required=False,
        flops=lambda p: 10 * p.rows * p.experts,
        moved=lambda p: p.rows * p.experts * itemsize(p.dtype),
    )


def _expert_mlp_spec() -> OpSpec:
    return OpSpec(
        name="expert_mlp",
        signature=(
            "expert_mlp(x [T, H], ids int32[T, k], probs f32[T, k], w13 [L, 2F, H], w2 [L, H, F], expert_map int32[E], "
            "*, w13_bias [L, 2F], w2_bias [L, H]) -> [T, H]; the partial sum over local experts; expert_map gives the "
            "local index, or -1"
        ),
        problem=ExpertProblem,
        specialise=_specialise_mlp,
        infer=lambda p, call: call.spec(0),
        reference=expert_mlp,
        cases=_mlp_cases,
        tolerance=Tolerance(depth=lambda p: max(p.hidden, p.width)),
        required=False,
        weight="experts",
        optional=_BIASES,
        default=_dispatched,
        flops=lambda p: 6 * p.rows * p.k * p.hidden * p.width,
        moved=_moved,
    )


def _grouped_mlp_spec() -> OpSpec:
    return OpSpec(
        name="grouped_mlp",
        signature=(
            "grouped_mlp(x [C, H], w13 [L, 2F, H], w2 [L, H, F], offsets int32[L + 1], *, w13_bias [L, 2F], "
            "w2_bias [L, H]) -> [C, H]"
        ),
        problem=ExpertProblem,
        specialise=_specialise_grouped,
        infer=lambda p, call: call.spec(0),
        reference=grouped_mlp,
        cases=_grouped_cases,
        tolerance=Tolerance(depth=lambda p: max(p.hidden, p.width)),
        required=False,
        weight="experts",
        optional=_BIASES,
        flops=lambda p: 6 * p.rows * p.hidden * p.width,
        moved=_moved,
    )


def _dispatch_spec() -> OpSpec:
    return OpSpec(
        name="moe_dispatch",
        signature=(
            "moe_dispatch(x [T, H], ids int32[T, k], expert_map int32[E], local) "
            "-> (rows [T * k, H], offsets int32[local + 1], source int32[T * k])"
        ),
        problem=ExpertProblem,
        specialise=_specialise_dispatch,
        infer=_infer_dispatch,
        reference=moe_dispatch,
        cases=_dispatch_cases,
        tolerance=Tolerance(exact=True),
        required=False,
        moved=lambda p: 2 * p.rows * p.k * p.hidden * itemsize(p.dtype),
    )


def _combine_spec() -> OpSpec:
    return OpSpec(
        name="moe_combine",
        signature="moe_combine(rows [T * k, H], source int32[T * k], probs f32[T, k]) -> [T, H]",
        problem=ExpertProblem,
        specialise=_specialise_combine,
        infer=lambda p, call: ArraySpec((p.rows, p.hidden), p.dtype),
        reference=moe_combine,
        cases=_combine_cases,
        tolerance=Tolerance(depth=lambda p: p.k),
        required=False,
        flops=lambda p: 2 * p.rows * p.k * p.hidden,
        moved=lambda p: (p.k + 1) * p.rows * p.hidden * itemsize(p.dtype),
    )


# ---- references ------------------------------------------------------------------------------------------------


def router_topk(problem: RouterProblem, logits: HostArray, *, num: Numerics = EXACT) -> tuple[HostArray, HostArray]:
    """The k experts of largest logit per token and their weights, which are not rounded to the executed dtype.

    softmax "before": the softmax over all experts; "after": over the chosen k. `renormalise` makes a token's weights
    sum to 1, then `scale` multiplies them. With `groups`, E experts form equal groups of neighbours, and only the
    `group_top` groups with the largest logits (ties to the lowest) are eligible.
    """
    x = num.load(logits)
    eligible = np.where(_eligible(problem, x), x, -np.inf)
    ids = np.argsort(-eligible, axis=-1, kind="stable")[:, : problem.k]
    probs = _softmax(x) if problem.softmax == "before" else x
    probs = np.take_along_axis(probs, ids, axis=-1)
    probs = probs if problem.softmax == "before" else _softmax(probs)
    if problem.renormalise:
        probs = probs / probs.sum(-1, keepdims=True)
    return ids.astype(np.int32), probs * problem.scale


def _eligible(problem: RouterProblem, x: HostArray) -> HostArray:
    if not problem.groups:
        return np.ones(x.shape, bool)
    best = x.reshape(len(x), problem.groups, -1).max(-1)
    chosen = np.argsort(-best, axis=-1, kind="stable")[:, : problem.group_top]
    allowed = np.zeros(best.shape, bool)
    np.put_along_axis(allowed, chosen, True, axis=-1)
    return np.repeat(allowed, problem.experts // problem.groups, axis=-1)


def _softmax(x: HostArray) -> HostArray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    out: HostArray = weights / weights.sum(-1, keepdims=True)
    return out


def expert_mlp(
    problem: ExpertProblem,
    x: HostArray,
    ids: HostArray,
    probs: HostArray,
    w13: HostArray,
    w2: HostArray,
    expert_map: HostArray,
    *,
    num: Numerics = EXACT,
    **biases: HostArray,
) -> HostArray:
    """sum over a token's local experts of prob * w2 (act(gate) * up), (gate, up) = w13 x; 0 where none is local.

    With biases as in `grouped_mlp`.
    """
    rows, offsets, source = moe_dispatch(problem, x, ids, expert_map, problem.local, num=num)
    return moe_combine(problem, grouped_mlp(problem, rows, w13, w2, offsets, num=num, **biases), source, probs, num=num)


def _dispatched(
    ops: Any, problem: ExpertProblem, x: Any, ids: Any, probs: Any, w13: Any, w2: Any, expert_map: Any, **biases: Any
) -> Any:
    rows, offsets, source = ops.moe_dispatch(x, ids, expert_map, problem.local)
    return ops.moe_combine(ops.grouped_mlp(rows, w13, w2, offsets, **biases), source, probs)


def moe_dispatch(
    problem: ExpertProblem, x: HostArray, ids: HostArray, expert_map: HostArray, local: int, *, num: Numerics = EXACT
) -> Triple:
    """Rows of x sorted by local expert, and by assignment t * k + j within one.

    Rows offsets[e] to offsets[e + 1] belong to local expert e; rows from offsets[local] on are 0 and stand for
    assignments to experts elsewhere. source[i] is the assignment of row i.
    """
    expert = expert_map[ids].reshape(-1)
    expert = np.where(expert < 0, local, expert)
    source = np.argsort(expert, kind="stable")
    offsets = np.searchsorted(expert[source], np.arange(local + 1))
    rows = num.load(x[source // ids.shape[1]])
    rows = np.where((expert[source] < local)[:, None], rows, 0)
    return num.save(rows), offsets.astype(np.int32), source.astype(np.int32)


def grouped_mlp(
    problem: ExpertProblem,
    x: HostArray,
    w13: HostArray,
    w2: HostArray,
    offsets: HostArray,
    *,
    num: Numerics = EXACT,
    w13_bias: HostArray | None = None,
    w2_bias: HostArray | None = None,
) -> HostArray:
    """Expert e's gated MLP of rows offsets[e] to offsets[e + 1]; rows from offsets[-1] on are 0 and not read.

    The gate is the first half of w13's rows. The hidden activation is rounded to the executed dtype. Each bias is added
    to the product before anything else happens to it.
    """
    out = np.zeros(x.shape, num.load(np.zeros(0)).dtype)
    zeros = np.zeros((len(w13), 1))
    first, second = (zeros if bias is None else num.load(bias) for bias in (w13_bias, w2_bias))
    for e in range(len(w13)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        gate, up = np.split(num.load(x[rows]) @ num.load(w13[e]).T + first[e], 2, axis=-1)
        out[rows] = num.load(num.save(_activate(problem, gate, up))) @ num.load(w2[e]).T + second[e]
    return num.save(out)


def _activate(problem: ExpertProblem, gate: HostArray, up: HostArray) -> HostArray:
    """act(gate) * up; "swigluoai": g / (1 + exp(-alpha g)) * (u + 1) of the gate cut off above and of up cut off on
    both sides at the limit (https://huggingface.co/openai/gpt-oss-20b)."""
    alpha, limit = problem.swiglu_alpha, problem.swiglu_limit
    if problem.activation == "swigluoai":
        active, up = silu(alpha * np.minimum(gate, limit)) / alpha, np.clip(up, -limit, limit) + 1
    else:
        active = {"silu": silu, "gelu": gelu}[problem.activation](gate)
    out: HostArray = active * up
    return out


def moe_combine(
    problem: ExpertProblem, rows: HostArray, source: HostArray, probs: HostArray, *, num: Numerics = EXACT
) -> HostArray:
    """out[t] = sum over j of probs[t, j] * (the row whose source is t * k + j)."""
    ordered = np.zeros(rows.shape, num.load(np.zeros(0)).dtype)
    ordered[source] = num.load(rows)
    parts = ordered.reshape(*probs.shape, rows.shape[1])
    return num.save((num.load(probs)[..., None] * parts).sum(1))


# ---- shapes ----------------------------------------------------------------------------------------------------


def _specialise_router(base: Any, call: Call) -> RouterProblem:
    problem = base_problem("router_topk", base, RouterProblem)
    logits = expect("router_topk", "logits", call.args[0], (None, problem.experts), problem.dtype)
    if problem.softmax not in ("before", "after"):
        refuse("router_topk", f"softmax={problem.softmax!r}", "'before' or 'after'")
    eligible = problem.experts
    if problem.groups:
        if problem.experts % problem.groups or not 0 < problem.group_top <= problem.groups:
            refuse("router_topk", f"{problem.group_top} of {problem.groups} groups", "groups that divide the experts")
        eligible = problem.experts // problem.groups * problem.group_top
    if not 0 < problem.k <= eligible:
        refuse("router_topk", f"k={problem.k}", f"1 to {eligible} eligible experts")
    return replace(problem, rows=logits.shape[0])


def _specialise_mlp(base: Any, call: Call) -> ExpertProblem:
    x, ids, probs, w13, _, expert_map = call.args
    problem = weight_problem("expert_mlp", base, w13, "experts", ExpertProblem)
    rows = expect("expert_mlp", "x", x, (None, problem.hidden), problem.dtype).shape[0]
    k = expect("expert_mlp", "ids", ids, (rows, None), "int32").shape[1]
    expect("expert_mlp", "probs", probs, (rows, k), wide(problem.dtype))
    expect("expert_mlp", "expert_map", expert_map, (problem.experts,), "int32")
    _check_experts("expert_mlp", problem, call)
    return replace(problem, rows=rows, k=k)


def _specialise_grouped(base: Any, call: Call) -> ExpertProblem:
    problem = weight_problem("grouped_mlp", base, call.args[1], "experts", ExpertProblem)
    x = expect("grouped_mlp", "x", call.args[0], (None, problem.hidden), problem.dtype)
    expect("grouped_mlp", "offsets", call.args[3], (problem.local + 1,), "int32")
    _check_experts("grouped_mlp", problem, call)
    return replace(problem, rows=x.shape[0], k=1)


def _check_experts(op: str, problem: ExpertProblem, call: Call) -> None:
    """Raises ContractViolation for an unknown activation, numbers that it has not or lacks, and misshapen biases."""
    clamped, numbers = problem.activation == "swigluoai", (problem.swiglu_alpha, problem.swiglu_limit)
    if problem.activation not in ("silu", "gelu", "swigluoai"):
        refuse(op, f"activation {problem.activation!r}", "silu, gelu or swigluoai")
    if not all(n > 0 if clamped else n == 0 for n in numbers):
        refuse(op, f"swiglu_alpha and swiglu_limit {numbers}", "both above 0 for swigluoai, else 0")
    for name, width in (("w13_bias", 2 * problem.width), ("w2_bias", problem.hidden)):
        if call.kwargs.get(name) is not None:
            expect(op, name, call.kwargs[name], (problem.local, width), problem.dtype)


def _specialise_dispatch(base: Any, call: Call) -> ExpertProblem:
    x = expect("moe_dispatch", "x", call.args[0], (None, None))
    ids = expect("moe_dispatch", "ids", call.args[1], (x.shape[0], None), "int32")
    experts = expect("moe_dispatch", "expert_map", call.args[2], (None,), "int32").shape[0]
    local = call.args[3]
    if type(local) is not int or not 0 < local <= experts:
        refuse("moe_dispatch", f"local = {local!r}", f"an int of 1 to {experts}")
    return ExpertProblem(
        dtype=x.dtype, experts=experts, local=local, hidden=x.shape[1], width=0, k=ids.shape[1], rows=x.shape[0]
    )


def _infer_dispatch(p: ExpertProblem, call: Call) -> tuple[ArraySpec, ...]:
    capacity = p.rows * p.k
    return (
        ArraySpec((capacity, p.hidden), p.dtype), ArraySpec((p.local + 1,), "int32"), ArraySpec((capacity,), "int32")
    )  # fmt: skip


def _specialise_combine(base: Any, call: Call) -> ExpertProblem:
    rows = expect("moe_combine", "rows", call.args[0], (None, None))
    probs = expect("moe_combine", "probs", call.args[2], (None, None), wide(rows.dtype))
    tokens, k = probs.shape
    expect("moe_combine", "rows", call.args[0], (tokens * k, None))
    expect("moe_combine", "source", call.args[1], (tokens * k,), "int32")
    return ExpertProblem(dtype=rows.dtype, experts=0, local=0, hidden=rows.shape[1], width=0, k=k, rows=tokens)


def _moved(p: ExpertProblem) -> int:
    weights = 3 * p.local * p.hidden * p.width
    return (weights + (1 + p.k) * p.rows * p.hidden) * itemsize(p.dtype)


# ---- cases -----------------------------------------------------------------------------------------------------

_ROUTERS: dict[str, tuple[dict[str, Any], str]] = {
    "before-k2": ({}, "weights are of the softmax over all experts, and not rounded to the executed dtype"),
    "before-renormalise-k4": ({"k": 4, "renormalise": True, "scale": 2.5}, "renormalise, then scale"),
    "after-k2": ({"softmax": "after"}, "the softmax is over the chosen"),
    "after-scale-k3": ({"softmax": "after", "k": 3, "scale": 0.5}, ""),
    "ties-k3": ({"k": 3}, "ties go to the lowest index"),
    "all_equal-k8": ({"k": 8}, "ties go to the lowest index, whatever the sort"),
    "all-k8": ({"k": 8}, "in descending order"),
    "one-k1": ({"k": 1}, ""),
    "extreme-k3": ({"k": 3}, "the softmax subtracts the peak"),
    "e128-k8": ({"experts": 128, "k": 8, "renormalise": True}, ""),
    "groups4of2-k3": ({"k": 3, "groups": 4, "group_top": 2}, "only experts of the best groups"),
    "group_ties-k2": ({"k": 2, "groups": 4, "group_top": 1}, "ties of groups go to the lowest"),
}


def _router_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _ROUTERS):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        fields, why = _ROUTERS[name]
        problem = RouterProblem(**{"dtype": dtype, "experts": 8, "k": 2, "rows": 5, **fields})
        # steps of 1/4 apart: distinct in every dtype, so that only equal logits tie
        logits = np.stack([rng.permutation(problem.experts) for _ in range(5)]) / 4.0 - 1.0
        if not name.startswith("e128"):
            logits += rng.uniform(-0.05, 0.05, logits.shape)
        if name.startswith("ties"):
            logits[:, [1, 4, 6]] = 2.0
        if name.startswith("all_equal"):
            logits[:] = 0.5
        if name.startswith("extreme"):
            logits = logits * 8192 - 4096
        if name.startswith("group_ties"):
            logits[:, [2, 5, 7]] = 3.0
        yield Case(case_id, problem, (logits,), why=why)


_MOE = {  # expert_map, how many are local, why
    "ep1-e4": ([0, 1, 2, 3], 4, ""),
    "ep2_first-e4": ([0, 1, -1, -1], 2, "expert_map -1: the expert lives elsewhere and adds nothing"),
    "ep2_second-e4": ([-1, -1, 0, 1], 2, "expert_map gives the local index"),
    "permuted-e4": ([2, 0, 3, 1], 4, "expert_map may permute"),
    "ep2_permuted-e4": ([1, -1, -1, 0], 2, "expert_map may permute, and the local experts need not be neighbours"),
    "none_chosen-e6": ([-1, -1, -1, -1, 1, 0], 2, "experts without a token"),
    "one_expert-e4": ([0, 1, 2, 3], 4, "every token to the same experts: no token is dropped, others are empty"),
}


def _moe(rng: np.random.Generator, name: str, dtype: str) -> tuple[ExpertProblem, HostArray, HostArray, HostArray]:
    """(problem, ids, probs, expert_map) of 5 tokens with 2 experts each; experts 4 and up are never chosen."""
    mapping, local, _ = _MOE[name]
    ids = np.stack([rng.permutation(4)[:2] for _ in range(5)]).astype(np.int32)
    if name.startswith("one_expert"):
        ids[:] = 2, 1
    probs = rng.dirichlet(np.ones(2), 5).astype(wide(dtype))
    problem = ExpertProblem(dtype=dtype, experts=len(mapping), local=local, hidden=12, width=10, k=2, rows=5)
    return problem, ids, probs, np.array(mapping, np.int32)


_SWIGLU: dict[str, Any] = {"activation": "swigluoai", "swiglu_alpha": 1.702, "swiglu_limit": 0.75}
_KINDS: dict[str, tuple[dict[str, Any], str]] = {  # what a case's name begins with
    "gelu": ({"activation": "gelu"}, ""),
    "swigluoai": (_SWIGLU, "the gate is cut off above, up on both sides, and up + 1 is gated"),
    "bias": ({"bias": True}, "biases are the expert's own, and weighted as its product is"),
    "bias_swigluoai": ({"bias": True, **_SWIGLU}, "biases are added before the activation and its limits"),
}


def _biases(rng: np.random.Generator, p: ExpertProblem) -> dict[str, HostArray]:
    widths = {"w13_bias": 2 * p.width, "w2_bias": p.hidden} if p.bias else {}
    return {name: rng.standard_normal((p.local, width)) for name, width in widths.items()}


def _weights(rng: np.random.Generator, p: ExpertProblem) -> tuple[WeightArg, WeightArg]:
    w13 = rng.standard_normal((p.local, 2 * p.width, p.hidden)) / np.sqrt(p.hidden)
    w2 = rng.standard_normal((p.local, p.hidden, p.width)) / np.sqrt(p.width)
    return WeightArg(w13, "experts"), WeightArg(w2, "experts")


def _mlp_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    names = [*_MOE, "gelu-ep1-e4", "swigluoai-ep1-e4", "bias-ep2_second-e4", "bias_swigluoai-permuted-e4"]
    for name, dtype in [*variants(size, names), ("sums-ep1-e4", "bfloat16")]:
        case_id, kind = f"{name}-{short(dtype)}", name.partition("-")[0]
        rng = draw(case_id)
        fields, why = _KINDS.get(kind, ({}, ""))
        table = name.removeprefix(f"{kind}-") if kind in (*_KINDS, "sums") else name
        problem, ids, probs, mapping = _moe(rng, table, dtype)
        problem = replace(problem, **fields)
        if kind == "sums":
            problem = replace(problem, hidden=512)
        x, (w13, w2) = rng.standard_normal((5, problem.hidden)), _weights(rng, problem)
        if kind == "sums":
            cancel(x, w13.array)
        why = _SUMS if kind == "sums" else why or _MOE[table][2]
        yield Case(case_id, problem, (x, ids, probs, w13, w2, mapping), _biases(rng, problem), why)


_SUMS = "sums are made in float32: products that cancel"
_OFFSETS = {
    "full": ([0, 3, 7, 10], ""), "empty_expert": ([0, 4, 4, 10], "an expert without rows"),
    "one_expert": ([0, 0, 10, 10], "one expert with every row"),
    "beyond_is_nan": ([0, 2, 3, 6], "rows beyond the last expert's are not read, and 0"),
    "none": ([0] * 4, "rows beyond the last expert's are not read, and 0"),
    "swigluoai": ([0, 3, 7, 10], ""),
    "bias": ([0, 3, 3, 6], "rows beyond the last expert's are 0, whatever the biases"),
    "bias_swigluoai": ([0, 3, 7, 10], ""),
    "sums": ([0, 3, 7, 10], _SUMS),
    "rows120": ([0, 70, 71, 117], ""), "rows420": ([0, 201, 202, 417], ""),
}  # fmt: skip
_SIZES: dict[str, dict[str, Any]] = {
    "sums": {"hidden": 512}, "rows120": {"rows": 120, "hidden": 32, "width": 48},
    "rows420": {"rows": 420, "hidden": 64, "width": 32},
}  # fmt: skip
"""Of problems unlike others: long sums, and for tiles of more rows 20 or 70 for each of the six experts."""


def _grouped_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in [*variants(size, [name for name in _OFFSETS if name != "sums"]), ("sums", "bfloat16")]:
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        offsets, why = _OFFSETS[name]
        problem = ExpertProblem(dtype=dtype, experts=6, local=3, hidden=12, width=10, k=1, rows=10)
        problem = replace(problem, **_KINDS.get(name, ({}, ""))[0], **_SIZES.get(name, {}))
        x = rng.standard_normal((problem.rows, problem.hidden))
        x[offsets[-1] :] = np.nan
        w13, w2 = _weights(rng, problem)
        if name == "sums":
            cancel(x, w13.array)
        yield Case(case_id, problem, (x, w13, w2, np.array(offsets, np.int32)), _biases(rng, problem), why)


def _dispatch_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _MOE):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        problem, ids, _, mapping = _moe(rng, name, dtype)
        x = rng.standard_normal((5, problem.hidden))
        yield Case(case_id, replace(problem, width=0), (x, ids, mapping, problem.local), why=_MOE[name][2])


def _combine_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in [*variants(size, ["t5-k2", "t3-k1", "t4-k6"]), ("sums-t3-k8", "bfloat16")]:
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        tokens, k = (int(part[1:]) for part in name.split("-")[-2:])
        problem = ExpertProblem(dtype=dtype, experts=0, local=0, hidden=12, width=0, k=k, rows=tokens)
        source = rng.permutation(tokens * k).astype(np.int32)
        probs = rng.dirichlet(np.ones(k), tokens).astype(wide(dtype))
        rows = rng.standard_normal((tokens * k, 12))
        if name.startswith("sums"):
            ordered = rows[np.argsort(source)].reshape(tokens, k, 12)
            ordered[:, :3], probs[:] = 100 * ordered[:, :3], 1 / k
            ordered[:, 3:6] = -ordered[:, :3]
            rows = ordered.reshape(-1, 12)[source]
        why = "source says which assignment a row is of" if k > 1 else ""
        yield Case(case_id, problem, (rows, source, probs), why=_SUMS if name.startswith("sums") else why)
