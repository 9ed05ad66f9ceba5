"""Attention over a paged cache: `attend`, `merge_states` and the composite `latent_attend`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lineshaft_contract.ops.cache import FNUZ, SPARSE, decode, fuzz_stored, make_cache, make_scales
from lineshaft_contract.ops.cases import FUZZ_DTYPES, Paging, fuzz_paging, paged_step, seeded, short, variants
from lineshaft_contract.ops.checks import base_problem, cache_problem, expect, refuse, weight_problem, wide
from lineshaft_contract.ops.linear import head_linear
from lineshaft_contract.ops.spec import (
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
from lineshaft_contract.problems import AttendProblem, LinearProblem, MergeProblem, itemsize
from lineshaft_contract.steps import ArraySpec

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
        fuzz=_fuzz,
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
        parts=lambda p: {"attend": p},
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
    blind = ~visible.any(-1, keepdims=True)
    peak = np.where(blind, 0, peak)  # whatever the sink of a query that sees no key
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + peak)[..., 0]
    whole = total if sinks is None else total + np.exp(sinks[:, None, None] - peak)
    out = np.matmul(weights, values.transpose(1, 0, 2)) / np.where(blind, 1, whole)
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

Table = Mapping[str, tuple[Paging, dict[str, Any], str]]

_VLLM = "https://github.com/vllm-project/vllm/issues/"
_TAIL = f"what lies past the context never leaks, as key or as value: {_VLLM}53856, {_VLLM}57493"
_ROWS0 = f"a padding row has context 0 and query length 0: {_VLLM}57094"
_CACHED = "query length 0 is legal: a fully cached prompt"
_BLIND = "a query that sees no key gives exactly 0, not mean(V); lse -inf"
_CAPPED = "a cap far above the scores leaves them nearly as they are: tanh is exact near 0 too"
_DECODE = Paging(((1, 20), (1, 33), (1, 1)))
_MIXED = Paging(((1, 20), (5, 5), (0, 7), (3, 37), (0, 0)), padding=3)
_VERIFY = Paging(((5, 30), (3, 3), (1, 8)))
_UNSEEN = Paging(((2, 0), (3, 1), (1, 4)), padding=1)
_ROWS = Paging(((1, 1), (1, 300), (1, 33), (1, 64)), 32)
_CHUNKS = Paging(((1, 40), (9, 9), (0, 7), (20, 75)), 32, padding=3)


def _heads(q_heads: int, kv_heads: int, dim: int = 32) -> dict[str, Any]:
    return {"q_heads": q_heads, "kv_heads": kv_heads, "qk_dim": dim, "v_dim": dim, "scale": dim**-0.5}


def _stored(kv_dtype: str, kv_scheme: str = "none", **fields: Any) -> dict[str, Any]:
    return {"kv_dtype": kv_dtype, "kv_scheme": kv_scheme, **fields}


_SHAPES: Table = {
    "decode/gqa4-page16-garbage_tail": (_DECODE, _heads(8, 2), _TAIL),
    "decode/nan_tail": (replace(_DECODE, garbage=(np.nan,)), {}, _TAIL),
    "decode/inf_tail": (replace(_DECODE, garbage=(np.inf, -np.inf)), {}, _TAIL),
    "decode/finite_tail": (replace(_DECODE, garbage=(3e4, -3e4)), {}, _TAIL + "; nan_to_num is no mask"),
    "decode/context1": (Paging(((1, 1),)), {}, ""),
    "decode/descending": (Paging(((1, 70), (1, 33), (1, 17), (1, 2))), {}, "rows come in any order of lengths"),
    "decode/padding_rows": (Paging(((1, 20), (0, 0), (0, 0), (1, 7), (0, 0))), {}, _ROWS0),
    "mixed/gqa2-page16-padding": (_MIXED, {}, "padding tokens, whose queries are NaN, give exactly 0"),
    "mixed/query0": (Paging(((0, 9), (2, 20), (0, 33), (1, 5), (0, 16))), {}, _CACHED),
    "mixed/query0-alone": (Paging(((0, 20), (0, 3)), padding=2), {}, _CACHED),
    "prefill/mha-page16": (Paging(((19, 19), (7, 7))), _heads(2, 2), "causality"),
    "chunk/mqa-page16": (Paging(((9, 40),)), {"kv_heads": 1}, "queries sit at the end of the context"),
    "verify/gqa2-page16": (Paging(((4, 30), (4, 4), (4, 51))), {}, ""),
    "verify/positions_shifted": (replace(_VERIFY, shifted=True), {}, "causality comes from lengths, not positions"),
    "decode/gqa1-page8-d64": (Paging(((1, 9), (1, 30)), 8), _heads(2, 2, 64), ""),
    "mixed/gqa3-page32-d80": (Paging(((1, 33), (3, 40)), 32, padding=1), _heads(6, 2, 80), ""),
    "mixed/gqa4-page64-d96": (Paging(((1, 65), (4, 20)), 64), _heads(4, 1, 96), ""),
    "mixed/gqa8-page128-d128": (Paging(((2, 130), (1, 128)), 128), _heads(8, 1, 128), ""),
    "decode/gqa8-page16-d256": (Paging(((1, 40), (1, 3))), _heads(8, 1, 256), ""),
    "decode/page24": (Paging(((1, 25), (1, 24), (1, 70)), 24), {}, "pages that 32 does not divide"),
    "chunk/page20": (Paging(((6, 41), (1, 3)), 20), {}, "pages that 32 does not divide"),
    "decode/page1": (Paging(((1, 5), (1, 2)), 1), {}, ""),
    "mixed/full_table": (Paging(((1, 48), (2, 32), (3, 33)), spare=0), {}, "the last column of the page table is used"),
    "mixed/stale_table": (
        Paging(((1, 17), (3, 60), (0, 0), (1, 33)), stale=True), {},
        "context_lens says which table entries count: others are in range, and may name live pages of other rows",
    ),
    "decode/high_ids-page4": (Paging(((1, 9), (2, 6)), 4, pool=70_000), _heads(2, 1), SPARSE),
    "mixed/no_visible_key": (_UNSEEN, {}, _BLIND),
    "mixed/all_padding": (Paging(((0, 0), (0, 0)), padding=4), {}, "the all-zero step is a legal empty step"),
}  # fmt: skip
_FEATURES: Table = {
    "mixed/window5": (_MIXED, {"window": 5}, "window counts visible keys, the query among them"),
    "decode/window1": (_DECODE, {"window": 1}, "window counts visible keys, the query among them"),
    "mixed/bidirectional-window4": (_MIXED, {"causal": False, "window": 4}, "a window bounds the past alone"),
    "decode/window9-dropped_pages": (
        Paging(((1, 30), (2, 44)), dropped=1), {"window": 9}, "page 0 in a table holds no key, even below the context",
    ),
    "decode/dropped_pages": (Paging(((1, 30), (2, 44)), dropped=1), {}, "page 0 is never read as live"),
    "mixed/softcap": (_MIXED, {"softcap": 2.0, "scale": 0.5}, "order: scale, soft cap, mask"),
    "decode/softcap30": (Paging(((1, 2), (1, 3)), 1, spare=0), {"softcap": 30.0, **_heads(8, 2, 64)}, _CAPPED),
    "mixed/softcap50": (Paging(((1, 2), (2, 3)), 1, spare=0), {"softcap": 50.0, **_heads(8, 2, 64)}, _CAPPED),
    "mixed/softcap-sinks-window": (
        _MIXED, {"softcap": 1.0, "scale": 0.5, "sinks": True, "window": 6}, "order: scale, soft cap, mask, sinks",
    ),
    "mixed/large_scores": (_MIXED, {"scale": 1.0}, "the softmax subtracts the peak: exp overflows float32 above 88"),
    "mixed/sinks": (_MIXED, {"sinks": True}, "sinks join the denominator, neither scaled nor masked"),
    "mixed/sinks-no_visible_key": (_UNSEEN, {"sinks": True}, _BLIND),
    "mixed/sinks_extreme-no_visible_key": (Paging(((2, 0), (1, 0)), padding=1), {"sinks": True}, _BLIND),
    "mixed/lse": (_MIXED, {"return_lse": True}, "lse is natural and not rounded to the executed dtype"),
    "mixed/lse-no_visible_key": (_UNSEEN, {"return_lse": True}, _BLIND),
    "mixed/lse-softcap-window": (_MIXED, {"return_lse": True, "softcap": 2.0, "window": 4}, "lse is of capped scores"),
    "mixed/bidirectional": (_MIXED, {"causal": False}, ""),
    "mixed/value_in_key": (_MIXED, {"value_in_key": True, "kv_heads": 1, "qk_dim": 64}, ""),
    "mixed/group1": (Paging(((1, 20), (5, 5)), group=1), {"group": 1}, "tables and lengths are of the problem's group"),
    "mixed/page_starts": (
        Paging(((1, 40), (4, 50)), starts=True), {"page_starts": True}, "page_starts says where a page's keys stand",
    ),
    "mixed/page_starts-lse": (Paging(((1, 10), (4, 50)), starts=True), {"page_starts": True, "return_lse": True}, ""),
    "mixed/key_ranges": (_MIXED, {"key_ranges": True, "causal": False}, "start <= position < stop"),
    "mixed/key_ranges-causal": (_MIXED, {"key_ranges": True}, "ranges and causality both hold"),
    "mixed/key_ranges-empty": (_MIXED, {"key_ranges": True}, "a fully masked row has a defined result: exactly 0"),
    "verify/ancestors": (_VERIFY, {"ancestors": True}, "bits are of the row's own queries; earlier keys are all seen"),
    "verify/ancestors-two_words": (Paging(((40, 45), (3, 3))), {"ancestors": True}, "bit j of word j // 32"),
    "verify/ancestors-not_itself": (Paging(((5, 5), (3, 8))), {"ancestors": True}, "itself only if its bit is set"),
    "mixed/wide_values": (_MIXED, {"qk_dim": 8, "v_dim": 24}, ""),
}  # fmt: skip
_PAGES: Table = {
    "decode/many_rows-page16": (
        Paging(tuple((1, 3 + 5 * row) for row in range(20))),
        {},
        "more rows than one block has",
    ),
    "mixed/bf16_pages": (_MIXED, _stored("bfloat16"), ""),
    "mixed/e4m3fn_pages": (_MIXED, _stored("float8_e4m3fn"), FNUZ + "; 0x80 is -0"),
    "mixed/e5m2_pages": (_MIXED, _stored("float8_e5m2"), FNUZ + "; 0x80 is -0"),
    "mixed/e4m3fnuz_pages": (_MIXED, _stored("float8_e4m3fnuz"), FNUZ + "; 0x80, in the garbage, is NaN"),
    "mixed/e5m2fnuz_pages": (_MIXED, _stored("float8_e5m2fnuz"), FNUZ + "; 0x80, in the garbage, is NaN"),
    "mixed/kv_tensor": (_MIXED, _stored("float8_e4m3fn", "tensor"), "keys and values have scales of their own"),
    "mixed/kv_tensor-e4m3fnuz": (_MIXED, _stored("float8_e4m3fnuz", "tensor"), FNUZ),
    "mixed/kv_tensor-int8": (_MIXED, _stored("int8", "tensor"), "finite garbage in the tail"),
    "mixed/kv_head": (_MIXED, _stored("float8_e5m2", "head"), "each head has scales of its own"),
    "mixed/kv_token_head": (_MIXED, _stored("int8", "token_head"), "unused slots have NaN scales"),
    "mixed/kv_block": (_MIXED, _stored("int8", "block", qk_dim=64), "unused slots have NaN scales"),
    "decode/kv_token_head-page32": (_ROWS, {**_heads(8, 2, 64), **_stored("int8", "token_head")}, _TAIL),
    "chunk/kv_token_head-page32": (_CHUNKS, {**_heads(8, 2, 64), **_stored("int8", "token_head")}, _TAIL),
    "chunk/kv_token_head-page64-window-softcap-sinks": (
        replace(_CHUNKS, page_size=64),
        {"window": 20, "softcap": 4.0, "sinks": True, **_stored("int8", "token_head", v_dim=64)},
        "the cap is of scaled scores",
    ),
    "chunk/kv_head-page32-lse": (_CHUNKS, {"return_lse": True, **_stored("int8", "head")}, "lse is of scaled scores"),
    "decode/kv_tensor-page32": (_ROWS, {**_heads(8, 2, 64), **_stored("int8", "tensor")}, ""),
    "chunk/e4m3fn_pages-page32": (_CHUNKS, {**_heads(8, 2, 64), **_stored("float8_e4m3fn")}, _TAIL),
    "decode/e5m2_pages-page32": (_ROWS, {**_heads(8, 2, 64), **_stored("float8_e5m2", "head")}, _TAIL),
    "mixed/kv_block-e4m3fnuz": (_MIXED, _stored("float8_e4m3fnuz", "block", qk_dim=64), FNUZ),
}
_SUMS: Table = {
    "sums/values": (Paging(((1, 256), (4, 200))), {}, "sums over keys are made in float32: values that cancel"),
    "sums/scores": (Paging(((1, 40), (2, 25))), _heads(4, 2, 128), "scores are made in float32: products that cancel"),
}
_ATTENDS: Table = {**_SHAPES, **_FEATURES, **_PAGES}
_LARGE: Table = {
    "decode/long-page16": (Paging(((1, 700), (1, 65), (1, 512))), _heads(8, 2, 64), ""),
    "prefill/long-page32": (Paging(((150, 150), (33, 290)), 32, padding=9), _heads(4, 2, 64), ""),
    "mixed/window64-sinks-softcap": (
        Paging(((80, 200), (1, 129), (0, 3))), {"window": 64, "sinks": True, "softcap": 20.0}, "",
    ),
    "decode/context32768-page16": (Paging(((1, 32_768), (1, 3))), _heads(4, 1), ""),
    "verify/context32768-page128": (Paging(((16, 32_768),), 128), _heads(3, 1), ""),
    "verify/context32768-window4096": (Paging(((4, 32_768), (1, 9)), 64, dropped=300), {"window": 4096}, ""),
    "decode/sparse_ids-page16": (
        Paging(((1, 100), (3, 35), (0, 9)), pool=70_000), _heads(2, 1),
        SPARSE + "; reaches byte 2^27 of an array, as an offset of 2^31 values does not fit 512 MB",
    ),
}  # fmt: skip


def _attend_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    table = {**_ATTENDS, **_LARGE, **_SUMS}
    for name, dtype in [*variants(size, _ATTENDS, _LARGE), *((name, "bfloat16") for name in _SUMS)]:
        if "sparse" in name and dtype == "float64":
            continue  # 570 MB
        case_id = f"{name}-{short(dtype)}"
        own = draw(case_id)
        case = _attend_case(case_id, own, dtype, *table[name])
        yield _arranged(own, name, case) if name in _SUMS or name == "mixed/large_scores" else case


def _attend_case(
    case_id: str, rng: np.random.Generator, dtype: str, paging: Paging, fields: Mapping[str, Any], why: str = ""
) -> Case:
    problem = attend_problem(dtype, paging, fields)
    paged = paged_step(rng, paging)
    v_dim = 0 if problem.value_in_key else None
    cache = CacheArg(make_cache(rng, problem, paged, v_dim, paging.garbage))
    q = rng.standard_normal((paging.tokens, problem.q_heads, problem.qk_dim))
    q[paging.tokens - paging.padding :] = np.nan
    kwargs: dict[str, Any] = make_scales(rng, problem)
    if problem.sinks:
        kwargs["sinks"] = rng.standard_normal(problem.q_heads) * 2
        if "extreme" in case_id:
            kwargs["sinks"][:3] = np.inf, np.nan, -np.inf
    if problem.key_ranges:
        ranges = np.sort(rng.integers(0, 40, (paging.tokens, 2)), axis=1).astype(np.int32)
        kwargs["key_ranges"] = np.where("empty" in case_id, ranges[:, :1], ranges).astype(np.int32)
    if problem.ancestors:
        words = max(-(-problem.max_query // 32), 1)
        bits = rng.integers(0, 2**32, (paging.tokens, words), dtype=np.uint32)
        own = _own_bit(paging, words)
        kwargs["ancestors"] = bits & ~own if "not_itself" in case_id else bits | own
    return Case(case_id, problem, (q, cache, paged.step), kwargs, why)


def _fuzz(rng: np.random.Generator, n: int) -> Case:
    pick = np.random.default_rng([n, 7])
    dtype = str(pick.choice(FUZZ_DTYPES))
    kv_heads = int(pick.integers(1, 4))
    chances: dict[str, Any] = {
        "window": int(pick.integers(1, 60)), "softcap": 5.0, "sinks": True, "causal": False, "key_ranges": True,
        "return_lse": True, "ancestors": True,
    }  # fmt: skip
    fields = {name: value for name, value in chances.items() if pick.random() < 0.25}
    if "return_lse" in fields:
        fields.pop("sinks", None)
    heads = _heads(kv_heads * int(pick.choice([1, 2, 3, 4, 8])), kv_heads, int(pick.choice([32, 64, 80, 128])))
    fields |= {**heads, **fuzz_stored(pick, dtype)}
    return _attend_case(f"fuzz/{n}-{short(dtype)}", rng, dtype, fuzz_paging(pick), fields)


def _arranged(rng: np.random.Generator, name: str, case: Case) -> Case:
    """The same with large scores that float32 holds exactly, or with large terms that cancel: in each sum over keys,
    all of one weight, or in each score."""
    q, cache, step = case.args
    k, v = cache.pages["k"], cache.pages["v"]
    if name == "mixed/large_scores":
        q[:], k[:] = np.rint(3 * q), np.rint(3 * k)
        return case
    if name == "sums/scores":
        q[..., :48], k[..., :48] = np.abs(q[..., :48]) + 1, np.abs(k[..., :48]) * 4 + 1
        q[..., 48:96], k[..., 48:96] = q[..., :48], -k[..., :48]
        return case
    lengths = step.arrays["context_lens.0"], np.diff(step.arrays["query_starts"])
    for table, keys, queries in zip(step.arrays["page_table.0"], *lengths, strict=True):
        slots = (table[:, None] * 16 + np.arange(16)).reshape(-1)[:keys]
        k.reshape(-1, *k.shape[2:])[slots] = 0.0
        half = 3 * (keys - queries) // 8
        large = rng.uniform(50, 100, (half, *v.shape[2:]))
        v.reshape(-1, *v.shape[2:])[slots[: 2 * half]] = np.concatenate([large, -large])
    return case


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


_MERGES = {
    "two": "", "three-sinks": "sinks join once, not once per part", "one": "", "large_lse": "the peak is subtracted",
    "empty_rows": "an all-empty row gives 0; parts of lse -inf are not read",
    "empty_rows-sinks": "an all-empty row gives 0 with a sink too",
}  # fmt: skip


def _merge_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _MERGES):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        parts, rows, heads, dim = {"two": 2, "one": 1}.get(name, 3), 4, 3, 8
        out = rng.standard_normal((parts, rows, heads, dim))
        lse = rng.standard_normal((parts, rows, heads)) * 3 + 300.0 * (name == "large_lse")
        if name.startswith("empty"):
            lse[:, 1], lse[0, 2] = -np.inf, -np.inf
            out[lse == -np.inf] = np.nan  # must not be read
        sinks = {"sinks": rng.standard_normal(heads)} if name.endswith("sinks") else {}
        problem = MergeProblem(dtype=dtype, parts=parts, rows=rows, heads=heads, v_dim=dim, sinks=bool(sinks))
        yield Case(case_id, problem, (out, lse.astype(wide(dtype))), sinks, _MERGES[name])


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
