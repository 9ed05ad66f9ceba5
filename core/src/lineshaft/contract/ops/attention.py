"""Attention over a paged cache: `attend`, `merge_states` and the composite `latent_attend`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lineshaft.contract.ops.cache import decode, make_cache, make_scales
from lineshaft.contract.ops.cases import Paging, paged_step, seeded, short, variants
from lineshaft.contract.ops.checks import base_problem, cache_problem, expect, refuse, weight_problem, wide
from lineshaft.contract.ops.linear import head_linear
from lineshaft.contract.ops.spec import (
    EXACT,
    CacheArg,
    Call,
    Case,
    HostArray,
    Numerics,
    OpSpec,
    Size,
    Tolerance,
    WeightArg,
)
from lineshaft.contract.problems import AttendProblem, LinearProblem, MergeProblem, itemsize
from lineshaft.contract.steps import ArraySpec

Pages = Mapping[str, HostArray]


def specs() -> tuple[OpSpec, ...]:
    return (_attend_spec(), _merge_spec(), _latent_spec())


def _attend_spec() -> OpSpec:
    return OpSpec(
        name="attend",
        signature=(
            "attend(q [T, Hq, D], cache, step, *, sinks [Hq], kv_scales f32[2] | f32[2, Hkv], key_ranges int32[T, 2], "
            "ancestors uint32[T, ceil(max_query / 32)]) -> out [T, Hq, Dv] | (out, lse f32[T, Hq])"
        ),
        problem=AttendProblem,
        specialise=_specialise_attend,
        infer=_infer_attend,
        reference=attend,
        cases=_attend_cases,
        tolerance=Tolerance(depth=lambda p: p.pages * p.page_size),
        optional={"sinks": "sinks", "kv_scales": "kv_scheme", "key_ranges": "key_ranges", "ancestors": "ancestors"},
        flops=_flops,
        moved=_moved,
    )


def _merge_spec() -> OpSpec:
    return OpSpec(
        name="merge_states",
        signature="merge_states(out [n, T, H, D], lse f32[n, T, H], *, sinks [H]) -> [T, H, D]",
        problem=MergeProblem,
        specialise=_specialise_merge,
        infer=lambda p, call: ArraySpec((p.rows, p.heads, p.v_dim), p.dtype),
        reference=merge_states,
        cases=_merge_cases,
        tolerance=Tolerance(depth=lambda p: p.parts),
        required=False,
        optional={"sinks": "sinks"},
        flops=lambda p: 3 * p.parts * p.rows * p.heads * p.v_dim,
        moved=lambda p: (p.parts + 1) * p.rows * p.heads * p.v_dim * itemsize(p.dtype),
    )


def _latent_spec() -> OpSpec:
    return OpSpec(
        name="latent_attend",
        signature=(
            "latent_attend(q_nope [T, H, Dn], q_rope [T, H, Dr], cache, w_uk [H, L, Dn], w_uv [H, Dv, L], step) "
            "-> [T, H, Dv]; the cache holds keys of L + Dr values"
        ),
        problem=AttendProblem,
        specialise=_specialise_latent,
        infer=_infer_latent,
        reference=latent_attend,
        cases=_latent_cases,
        tolerance=Tolerance(depth=lambda p: p.pages * p.page_size + p.qk_dim),
        required=False,
        default=_absorbed,
        flops=_flops,
        moved=_moved,
    )


# ---- attend ----------------------------------------------------------------------------------------------------


def attend(
    problem: AttendProblem,
    q: HostArray,
    cache: Pages,
    step: Any,
    *,
    num: Numerics = EXACT,
    sinks: HostArray | None = None,
    kv_scales: HostArray | None = None,
    key_ranges: HostArray | None = None,
    ancestors: HostArray | None = None,
) -> HostArray | tuple[HostArray, HostArray]:
    """Attention of a ragged batch over a paged cache; row by row, in the order scale, soft cap, mask, sinks.

    Query j of row b sits at context_lens[b] - q_len[b] + j. It sees the row's keys below context_lens[b] that lie on a
    page other than 0, and of these, causal: none beyond its own position; window > 0: the last `window` positions up
    to its own; key_ranges: start <= position < stop; ancestors: of the row's own queries, those whose bit is set (bit
    j of word j // 32), itself included only if its bit is. The result is exactly 0, and lse -inf, for tokens at or
    after query_starts[B] and for a query that sees no key. Keys and values that no query of a row sees are not read.
    `lse` is natural, without sinks and not rounded to the executed dtype.
    """
    if problem.return_lse and problem.sinks:
        refuse("attend", "return_lse with sinks", "sinks in merge_states, which adds them once")
    tokens, heads = q.shape[:2]
    out = np.zeros((tokens, heads, problem.v_dim), num.load(np.zeros(0)).dtype)
    lse = np.full((tokens, heads), -np.inf, out.dtype)
    for row in _rows(problem, step):
        k, v, at = _live_keys(problem, cache, row, kv_scales, num)
        span = row.tokens
        visible = _visible(problem, row, at, key_ranges, ancestors)
        seen = visible.any(0)
        parts = num.load(q[span]), k[seen], v[seen], visible[:, seen]
        out[span], lse[span] = _softmax(problem, *parts, None if sinks is None else num.load(sinks))
    return (num.save(out), lse) if problem.return_lse else num.save(out)


@dataclass(frozen=True)
class _Row:
    """A row with at least one query: its tokens, its keys' count, its pages and the position each page starts at."""

    tokens: slice
    context: int
    pages: HostArray
    starts: HostArray

    @property
    def positions(self) -> HostArray:
        """int64[q_len]: where its queries sit."""
        count = self.tokens.stop - self.tokens.start
        return np.arange(self.context - count, self.context)


def _rows(problem: AttendProblem, step: Any) -> Iterable[_Row]:
    group, bounds = problem.group, step.arrays["query_starts"]
    table, lengths = step.arrays[f"page_table.{group}"], step.arrays[f"context_lens.{group}"]
    usual = np.arange(table.shape[1]) * problem.page_size
    for b in range(len(bounds) - 1):
        if bounds[b + 1] > bounds[b]:
            starts = step.arrays[f"page_starts.{group}"][b] if problem.page_starts else usual
            held = (table[b] != 0) & (starts < lengths[b])
            yield _Row(slice(int(bounds[b]), int(bounds[b + 1])), int(lengths[b]), table[b][held], starts[held])


def _live_keys(
    problem: AttendProblem, cache: Pages, row: _Row, kv_scales: HostArray | None, num: Numerics
) -> tuple[HostArray, HostArray, HostArray]:
    """(k [n, Hkv, D], v [n, Hkv, Dv], positions int64[n]) of a row's keys."""
    at = (row.starts[:, None].astype(np.int64) + np.arange(problem.page_size)).reshape(-1)
    live = at < row.context
    k = decode(problem, "k", cache, row.pages, None if kv_scales is None else kv_scales[0], num)[live]
    if problem.value_in_key:
        return k, k[..., : problem.v_dim], at[live]
    return k, decode(problem, "v", cache, row.pages, None if kv_scales is None else kv_scales[1], num)[live], at[live]


def _visible(
    problem: AttendProblem, row: _Row, at: HostArray, key_ranges: HostArray | None, ancestors: HostArray | None
) -> HostArray:
    """bool[q_len, n]: which of the row's keys, at positions `at`, each of its queries sees."""
    query = row.positions[:, None]
    seen: HostArray = np.ones((len(query), len(at)), bool)
    if problem.causal:
        seen = seen & (at <= query)
    if problem.window:
        seen = seen & (at > query - problem.window)
    if key_ranges is not None:
        seen = seen & (at >= key_ranges[row.tokens, :1]) & (at < key_ranges[row.tokens, 1:])
    if ancestors is not None:
        seen = seen & _is_ancestor(ancestors[row.tokens], at - row.positions[0])
    return seen


def _is_ancestor(bits: HostArray, relative: HostArray) -> HostArray:
    """bits uint32[q_len, words], relative int64[n] (key minus first query) -> bool[q_len, n]; True below 0."""
    index = np.clip(relative, 0, bits.shape[1] * 32 - 1)
    return ((bits[:, index // 32] >> (index % 32).astype(np.uint32)) & 1).astype(bool) | (relative < 0)


def _softmax(
    problem: AttendProblem, q: HostArray, k: HostArray, v: HostArray, visible: HostArray, sinks: HostArray | None
) -> tuple[HostArray, HostArray]:
    """(out [q_len, Hq, Dv], lse [q_len, Hq]) of one row; 0 and -inf where nothing is visible."""
    share = problem.q_heads // problem.kv_heads
    keys, values = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    scores = np.matmul(q.transpose(1, 0, 2), keys.transpose(1, 2, 0)) * problem.scale  # [Hq, q_len, n]
    if problem.softcap:
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    scores = np.where(visible, scores, -np.inf)
    peak = scores.max(-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        peak = np.maximum(peak, sinks[:, None, None])
    peak = np.where(peak == -np.inf, 0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + peak)[..., 0]
    whole = total if sinks is None else total + np.exp(sinks[:, None, None] - peak)
    out = np.matmul(weights, values.transpose(1, 0, 2)) / np.where(whole == 0, 1, whole)
    return out.transpose(1, 0, 2), lse.T


def _specialise_attend(base: Any, call: Call) -> AttendProblem:
    problem = base_problem("attend", base, AttendProblem)
    expect("attend", "q", call.args[0], (None, problem.q_heads, problem.qk_dim), problem.dtype)
    return _over_step("attend", problem, call.args[0], call.args[1], call.args[2])


def _over_step(op: str, problem: AttendProblem, q: Any, cache: Any, step: Any) -> AttendProblem:
    """`problem` with the step's sizes; raises ContractViolation where q, cache and step do not fit together."""
    held = cache_problem(op, cache)
    if problem.return_lse and problem.sinks:
        refuse(op, "return_lse with sinks", "sinks in merge_states, which adds them once")
    if problem.q_heads % problem.kv_heads:
        refuse(op, f"{problem.q_heads} query heads", f"a multiple of {problem.kv_heads} key heads")
    for name in ("kv_heads", "qk_dim", "page_size", "kv_dtype", "kv_scheme", "group"):
        if getattr(problem, name) != getattr(held, name):
            refuse(op, f"a cache of {name}={getattr(held, name)}", f"{name}={getattr(problem, name)}")
    if not problem.value_in_key and problem.v_dim != held.v_dim:
        refuse(op, f"a cache of v_dim={held.v_dim}", f"v_dim={problem.v_dim}")
    if problem.page_starts and step.arrays.get(f"page_starts.{problem.group}") is None:
        refuse(op, f"a step without page_starts.{problem.group}", "one with it")
    shape = step.shape
    if q.shape[0] != shape.tokens:
        refuse(op, f"q of {q.shape[0]} tokens", f"the step's {shape.tokens}")
    return replace(
        problem, tokens=shape.tokens, rows=shape.rows, pages=shape.pages[problem.group], max_query=shape.max_query
    )


def _infer_attend(problem: AttendProblem, call: Call) -> ArraySpec | tuple[ArraySpec, ...]:
    out = ArraySpec((problem.tokens, problem.q_heads, problem.v_dim), problem.dtype)
    if not problem.return_lse:
        return out
    return out, ArraySpec((problem.tokens, problem.q_heads), wide(problem.dtype))


def _flops(p: AttendProblem) -> int:
    """Upper bound: every token sees every key of its row's page table."""
    return 2 * p.tokens * p.q_heads * (p.qk_dim + p.v_dim) * p.pages * p.page_size


def _moved(p: AttendProblem) -> int:
    keys = p.rows * p.pages * p.page_size * p.kv_heads * (p.qk_dim + (0 if p.value_in_key else p.v_dim))
    return keys * itemsize(p.kv_dtype) + p.tokens * p.q_heads * (p.qk_dim + p.v_dim) * itemsize(p.dtype)


# ---- merge_states ----------------------------------------------------------------------------------------------


def merge_states(
    problem: MergeProblem, out: HostArray, lse: HostArray, *, num: Numerics = EXACT, sinks: HostArray | None = None
) -> HostArray:
    """Attention over the union of disjoint keys from each part's attention and lse; sinks join the denominator once.

    A part of lse -inf is not read; where all are, the result is 0.
    """
    logs = num.load(lse)
    peak = logs.max(0)
    if sinks is not None:
        peak = np.maximum(peak, num.load(sinks))
    peak = np.where(peak == -np.inf, 0, peak)
    weights = np.exp(logs - peak)
    whole = weights.sum(0) + (0 if sinks is None else np.exp(num.load(sinks) - peak))
    parts = np.where((logs > -np.inf)[..., None], num.load(out), 0)
    return num.save((weights[..., None] * parts).sum(0) / np.where(whole == 0, 1, whole)[..., None])


def _specialise_merge(base: Any, call: Call) -> MergeProblem:
    out = expect("merge_states", "out", call.args[0], (None, None, None, None))
    parts, rows, heads, v_dim = out.shape
    expect("merge_states", "lse", call.args[1], (parts, rows, heads), wide(out.dtype))
    sinks = call.kwargs.get("sinks")
    if sinks is not None:
        expect("merge_states", "sinks", sinks, (heads,))
    return MergeProblem(dtype=out.dtype, parts=parts, rows=rows, heads=heads, v_dim=v_dim, sinks=sinks is not None)


# ---- latent_attend ---------------------------------------------------------------------------------------------


def latent_attend(
    problem: AttendProblem,
    q_nope: HostArray,
    q_rope: HostArray,
    cache: Pages,
    w_uk: HostArray,
    w_uv: HostArray,
    step: Any,
    *,
    num: Numerics = EXACT,
) -> HostArray:
    """Multi-head latent attention (DeepSeek-V2, 2024), absorbed: w_uk maps queries into the latent space.

    The cache's keys are (latent [L], rope key [Dr]), one head, and its values are the latents. Intermediates are
    rounded to the executed dtype, as the default decomposition does.
    """
    linear = LinearProblem(dtype=problem.dtype, n=0, k=0, heads=problem.q_heads)
    latent = head_linear(linear, q_nope, w_uk, num=num)
    q = np.concatenate([latent, num.save(num.load(q_rope))], axis=-1)
    out = attend(problem, q, cache, step, num=num)
    assert isinstance(out, np.ndarray)
    return head_linear(linear, out, w_uv, num=num)


def _absorbed(
    ops: Any, problem: AttendProblem, q_nope: Any, q_rope: Any, cache: Any, w_uk: Any, w_uv: Any, step: Any
) -> Any:
    q = ops.concat([ops.head_linear(q_nope, w_uk), q_rope], 2)
    return ops.head_linear(ops.attend(q, cache, step), w_uv)


def _specialise_latent(base: Any, call: Call) -> AttendProblem:
    q_nope, q_rope, cache, w_uk, w_uv, step = call.args
    up_k = weight_problem("latent_attend", None, w_uk, "linear", LinearProblem)
    up_v = weight_problem("latent_attend", None, w_uv, "linear", LinearProblem)
    problem = base_problem("latent_attend", base, AttendProblem)
    expect("latent_attend", "q_nope", q_nope, (None, problem.q_heads, up_k.k), problem.dtype)
    rope = expect("latent_attend", "q_rope", q_rope, (q_nope.shape[0], problem.q_heads, None), problem.dtype)
    if problem.qk_dim != up_k.n + rope.shape[2] or problem.v_dim != up_k.n or up_v.k != up_k.n:
        refuse(
            "latent_attend", f"latents of {up_k.n} and {up_v.k}, rope part {rope.shape[2]}",
            f"latents of {problem.v_dim} in keys of {problem.qk_dim}",
        )  # fmt: skip
    return _over_step("latent_attend", problem, q_nope, cache, step)


def _infer_latent(problem: AttendProblem, call: Call) -> ArraySpec:
    up_v = weight_problem("latent_attend", None, call.args[4], "linear", LinearProblem)
    return ArraySpec((problem.tokens, problem.q_heads, up_v.n), problem.dtype)


# ---- cases -----------------------------------------------------------------------------------------------------

_DECODE = Paging(((1, 20), (1, 33), (1, 1)))
_MIXED = Paging(((1, 20), (5, 5), (0, 7), (3, 37), (0, 0)), padding=3)
_SPARSE = Paging(((1, 9), (2, 6)), page_size=4, pool=70000)
_MQA = {"kv_heads": 1, "qk_dim": 8, "v_dim": 8}

_ATTENDS: dict[str, tuple[Paging, dict[str, Any]]] = {
    "decode/gqa4-page16-garbage_tail": (_DECODE, {"q_heads": 8, "kv_heads": 2}),
    "mixed/gqa2-page16-padding": (_MIXED, {}),
    "prefill/mha-page16": (Paging(((19, 19), (7, 7))), {"q_heads": 2}),
    "chunk/mqa-page16": (Paging(((9, 40),)), {"kv_heads": 1}),
    "verify/gqa2-page16": (Paging(((4, 30), (4, 4), (4, 51))), {}),
    "decode/page24": (Paging(((1, 25), (1, 24), (1, 70)), page_size=24), {}),
    "chunk/page20": (Paging(((6, 41), (1, 3)), page_size=20), {}),
    "decode/page1": (Paging(((1, 5), (1, 2)), page_size=1), {}),
    "decode/high_ids-page4": (_SPARSE, _MQA),
    "mixed/no_visible_key": (Paging(((2, 0), (3, 1), (1, 4)), padding=1), {}),
    "mixed/all_padding": (Paging(((0, 0), (0, 0)), padding=4), {}),
    "mixed/window5": (_MIXED, {"window": 5}),
    "decode/window1": (_DECODE, {"window": 1}),
    "decode/window9-dropped_pages": (Paging(((1, 30), (2, 44)), dropped=1), {"window": 9}),
    "mixed/softcap": (_MIXED, {"softcap": 2.0, "scale": 1.0}),
    "mixed/sinks": (_MIXED, {"sinks": True}),
    "mixed/sinks-no_visible_key": (Paging(((2, 0), (3, 1), (1, 4)), padding=1), {"sinks": True}),
    "mixed/lse": (_MIXED, {"return_lse": True}),
    "mixed/bidirectional": (_MIXED, {"causal": False}),
    "mixed/value_in_key": (_MIXED, {"value_in_key": True, "kv_heads": 1, "qk_dim": 64}),
    "mixed/group1": (Paging(((1, 20), (5, 5)), group=1), {"group": 1}),
    "mixed/page_starts": (Paging(((1, 40), (4, 50)), starts=True), {"page_starts": True}),
    "mixed/page_starts-lse": (Paging(((1, 10), (4, 50)), starts=True), {"page_starts": True, "return_lse": True}),
    "mixed/key_ranges": (_MIXED, {"key_ranges": True, "causal": False}),
    "verify/ancestors": (Paging(((5, 30), (3, 3), (1, 8))), {"ancestors": True}),
    "mixed/kv_tensor": (_MIXED, {"kv_dtype": "float8_e4m3fn", "kv_scheme": "tensor"}),
    "mixed/kv_head": (_MIXED, {"kv_dtype": "float8_e5m2", "kv_scheme": "head"}),
    "mixed/kv_token_head": (_MIXED, {"kv_dtype": "int8", "kv_scheme": "token_head"}),
    "mixed/kv_block": (_MIXED, {"kv_dtype": "int8", "kv_scheme": "block", "qk_dim": 64, "v_dim": 32}),
    "mixed/bf16_pages": (_MIXED, {"kv_dtype": "bfloat16"}),
    "mixed/wide_values": (_MIXED, {"qk_dim": 8, "v_dim": 24}),
}
_LARGE: dict[str, tuple[Paging, dict[str, Any]]] = {
    "decode/long-page16": (Paging(((1, 700), (1, 65), (1, 512))), {"q_heads": 8, "qk_dim": 64, "v_dim": 64}),
    "prefill/long-page32": (Paging(((150, 150), (33, 290)), page_size=32, padding=9), {"qk_dim": 64, "v_dim": 64}),
    "mixed/window64-sinks-softcap": (
        Paging(((80, 200), (1, 129), (0, 3))), {"window": 64, "sinks": True, "softcap": 20.0},
    ),
}  # fmt: skip


def _attend_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    table = {**_ATTENDS, **_LARGE}
    for name, dtype in variants(size, _ATTENDS, _LARGE):
        case_id = f"{name}-{short(dtype)}"
        yield _attend_case(case_id, draw(case_id), dtype, *table[name])


def _attend_case(case_id: str, rng: np.random.Generator, dtype: str, paging: Paging, fields: Mapping[str, Any]) -> Case:
    problem = attend_problem(dtype, paging, fields)
    paged = paged_step(rng, paging)
    cache = CacheArg(make_cache(rng, problem, paged, v_dim=0 if problem.value_in_key else None))
    q = rng.standard_normal((paging.tokens, problem.q_heads, problem.qk_dim))
    q[paging.tokens - paging.padding :] = np.nan
    kwargs: dict[str, Any] = make_scales(rng, problem)
    if problem.sinks:
        kwargs["sinks"] = rng.standard_normal(problem.q_heads) * 2
    if problem.key_ranges:
        kwargs["key_ranges"] = np.sort(rng.integers(0, 40, (paging.tokens, 2)), axis=1).astype(np.int32)
    if problem.ancestors:
        words = -(-problem.max_query // 32)
        bits = rng.integers(0, 2**32, (paging.tokens, words), dtype=np.uint32)
        kwargs["ancestors"] = bits | _own_bit(paging, words)
    return Case(case_id, problem, (q, cache, paged.step), kwargs)


def _own_bit(paging: Paging, words: int) -> HostArray:
    """uint32[T, words]: each query's own bit."""
    own = np.zeros((paging.tokens, words), np.uint32)
    token = 0
    for query, _ in paging.lengths:
        for j in range(query):
            own[token + j, j // 32] = 1 << (j % 32)
        token += query
    return own


def attend_problem(dtype: str, paging: Paging, fields: Mapping[str, Any]) -> AttendProblem:
    """The problem of an attend over `paging`, with small heads unless `fields` says otherwise."""
    given = {"q_heads": 4, "kv_heads": 2, "qk_dim": 32, "v_dim": 32, "scale": 32**-0.5, "kv_dtype": dtype, **fields}
    return AttendProblem(
        dtype=dtype, page_size=paging.page_size, tokens=paging.tokens, rows=len(paging.lengths), pages=paging.columns,
        max_query=max(query for query, _ in paging.lengths), **given,
    )  # fmt: skip


def _merge_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, ["two", "three-sinks", "one", "empty_rows", "empty_rows-sinks"]):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        parts, rows, heads, dim = {"two": 2, "one": 1}.get(name, 3), 4, 3, 8
        out = rng.standard_normal((parts, rows, heads, dim))
        lse = rng.standard_normal((parts, rows, heads)) * 3
        if name.startswith("empty"):
            lse[:, 1], lse[0, 2] = -np.inf, -np.inf
            out[lse == -np.inf] = np.nan  # must not be read
        sinks = {"sinks": rng.standard_normal(heads)} if name.endswith("sinks") else {}
        problem = MergeProblem(dtype=dtype, parts=parts, rows=rows, heads=heads, v_dim=dim, sinks=bool(sinks))
        yield Case(case_id, problem, (out, lse.astype(wide(dtype))), sinks)


def _latent_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    pagings = {"mixed": _MIXED, "decode": _DECODE}
    for name, dtype in variants(size, pagings):
        case_id = f"{name}/latent12-rope4-{short(dtype)}"
        rng = draw(case_id)
        latent, rope, nope, v_dim, heads, paging = 12, 4, 6, 5, 3, pagings[name]
        fields = {"q_heads": heads, "kv_heads": 1, "qk_dim": latent + rope, "v_dim": latent, "value_in_key": True}
        problem = attend_problem(dtype, paging, fields)
        paged = paged_step(rng, paging)
        cache = CacheArg(make_cache(rng, problem, paged, v_dim=0))
        q_nope, q_rope = (rng.standard_normal((paging.tokens, heads, dim)) for dim in (nope, rope))
        w_uk = WeightArg(rng.standard_normal((heads, latent, nope)) / np.sqrt(nope), "linear")
        w_uv = WeightArg(rng.standard_normal((heads, v_dim, latent)) / np.sqrt(latent), "linear")
        yield Case(case_id, problem, (q_nope, q_rope, cache, w_uk, w_uv, paged.step))
