"""Mutants of attention: `attend`, `merge_states` and the composite `latent_attend`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lineshaft_conformance.mutants.mutant import (
    Make,
    Mutant,
    mutant,
    with_added,
    with_call,
    with_problem,
    with_result,
)
from lineshaft_conformance.mutants.plain import INF, PlainAttend, Row, attend_with
from lineshaft_torch.bound import dense, recipe
from lineshaft_torch.bound import with_problem as given_problem
from lineshaft_torch.pages import SLOTS_LAYOUT

Plain = PlainAttend
Tensor = torch.Tensor


# ---- which keys a query sees -----------------------------------------------------------------------------------


def drops_page_edge(self: Plain, row: Row, at: Tensor, given: Any) -> Tensor:
    seen = Plain.visible(self, row, at, given)
    return seen if row.context % self.problem.page_size else seen & (at != row.context - 1)


def sees_beyond_context(self: Plain, row: Row, at: Tensor, given: Any) -> Tensor:
    whole = -(-row.context // self.problem.page_size) * self.problem.page_size
    return Plain.visible(self, replace(row, context=whole), at, given)


def sees_null_page(self: Plain, row: Row, at: Tensor, given: Any) -> Tensor:
    return Plain.visible(self, replace(row, pages=row.pages + 1), at, given)


def by_positions(self: Plain, step: Any) -> Iterator[Row]:
    for row in Plain.rows(self, step):
        yield replace(row, query=step.positions[row.tokens].long())


def from_zero(self: Plain, step: Any) -> Iterator[Row]:
    for row in Plain.rows(self, step):
        yield replace(row, query=row.query - row.query[0])


def first_query_only(self: Plain, step: Any) -> Iterator[Row]:
    for row in Plain.rows(self, step):
        start = row.tokens.start
        yield replace(row, tokens=slice(start, start + 1), query=row.query[:1])


def counts_rows_with_queries(self: Plain, step: Any) -> Iterator[Row]:
    view = self.view(step)
    for at, row in enumerate(Plain.rows(self, step)):
        yield replace(row, pages=view.page_table[at].long(), context=int(view.context_lens[at]))


def up_to_512_keys(self: Plain, row: Row, at: Tensor, given: Any) -> Tensor:
    return Plain.visible(self, row, at, given) & (at >= row.context - 512)


def inclusive_stop(self: Plain, row: Row, at: Tensor, given: Any) -> Tensor:
    return Plain.visible(self, row, at, {**given, "key_ranges": given["key_ranges"] + torch.tensor([0, 1])})


def own_bit_is_set(self: Plain, row: Row, at: Tensor, given: Any) -> Tensor:
    return Plain.visible(self, row, at, given) | (at == row.query[:, None])


VISIBLE = (
    mutant(
        "drops-page-edge", "all context_lens keys are seen, also where the last one ends a page (step)",
        "attend/mixed/full_table*", attend_with(visible=drops_page_edge),
    ),
    mutant(
        "beyond-context", "no key at or after context_lens is seen (step)", "attend/mixed/bidirectional-f32",
        attend_with(visible=sees_beyond_context),
    ),
    mutant(
        "null-page-live", "page 0 is never read as live (step)", "attend/decode/dropped_pages*",
        attend_with(visible=sees_null_page),
    ),
    mutant(
        "causal-by-positions", "positions are for RoPE only; causality uses context_lens alone (step)",
        "attend/verify/positions_shifted*", attend_with(rows=by_positions),
    ),
    mutant(
        "query-from-zero", "query j of row b sits at context_lens[b] - q_len[b] + j (step)", "attend/chunk/*",
        attend_with(rows=from_zero),
    ),
    mutant(
        "first-query-only", "one attend serves chunks and verification, not decode alone (ops)", "attend/verify/*",
        attend_with(rows=first_query_only),
    ),
    mutant(
        "skips-empty-rows", "a row of query length 0 is legal and keeps its place (step)", "attend/mixed/*padding-f32",
        attend_with(rows=counts_rows_with_queries),
    ),
    mutant(
        "only-512-keys", "a context may be as long as its pages", "attend/decode/long-page16-f32",
        attend_with(visible=up_to_512_keys), size="full",
    ),
    mutant(
        "causal-ignored", "a causal query sees no key beyond its own position (ops)", "attend/prefill/*",
        with_problem("attend", lambda p: {"causal": False}),
    ),
    mutant(
        "always-causal", "causal=False sees every key of the context (ops)", "attend/mixed/bidirectional-f32",
        with_problem("attend", lambda p: {"causal": True}),
    ),
    mutant(
        "window-without-query", "window counts the query itself (ops)", "attend/*window*",
        with_problem("attend", lambda p: {"window": p.window and p.window + 1}),
    ),
    mutant(
        "window-one-short", "window counts `window` keys, the query included (ops)", "attend/mixed/window5-f32",
        with_problem("attend", lambda p: {"window": max(p.window - 1, 1) if p.window else 0}),
    ),
    mutant(
        "window-ignored", "window is a field of the problem (ops)", "attend/mixed/window5-f32",
        with_problem("attend", lambda p: {"window": 0}),
    ),
    mutant(
        "inclusive-ranges", "key_ranges is start <= position < stop (ops)", "attend/mixed/key_ranges-f32",
        attend_with(visible=inclusive_stop),
    ),
    mutant(
        "ranges-ignored", "key_ranges bounds what a query sees (ops)", "attend/mixed/key_ranges-f32",
        with_call("attend", lambda p, run, q, *rest, key_ranges=None, **kw: run(
            q, *rest, **kw, **({} if key_ranges is None else {"key_ranges": key_ranges * 0 + torch.tensor([0, 9999])})
        )),
    ),
    mutant(
        "ancestors-ignored", "ancestors says which of the row's own queries are seen (ops)", "attend/verify/ancestors*",
        attend_with(ancestor=lambda self, bits, relative: (relative < 9999).expand(len(bits), -1)),
    ),
    mutant(
        "own-bit-assumed", "a query sees itself if its own bit is set (ops)", "attend/verify/ancestors-not_itself*",
        attend_with(visible=own_bit_is_set),
    ),
    mutant(
        "ancestors-one-word", "ancestors has ceil(max_query / 32) words (ops)", "attend/verify/ancestors-two_words*",
        attend_with(ancestor=lambda self, bits, relative: Plain.ancestor(self, bits[:, :1], relative)),
    ),
    mutant(
        "page-starts-ignored", "page_starts gives the position at which each page starts (step)",
        "attend/mixed/page_starts*", attend_with(rows=lambda self, step: [
            replace(row, starts=torch.arange(len(row.pages)) * self.problem.page_size) for row in Plain.rows(self, step)
        ]),
    ),
)  # fmt: skip


# ---- where keys lie --------------------------------------------------------------------------------------------


def pages_of_16(self: Plain, row: Row) -> Tensor:
    at = torch.arange(len(row.pages) * self.problem.page_size)
    return row.pages[(at // 16).clamp(max=len(row.pages) - 1)] * self.problem.page_size + at % min(
        self.problem.page_size, 16
    )


def interleaved_heads(self: Plain, x: Tensor) -> Tensor:
    return x.repeat(1, self.problem.q_heads // self.problem.kv_heads, 1)


def first_16_rows(self: PlainAttend, step: Any) -> Any:
    return (row for row in PlainAttend.rows(self, step) if row.index < 16)


PLACES = (
    mutant("first-16-rows", "a step may have any number of rows (step)", "attend/decode/many_rows*",
           attend_with(rows=first_16_rows)),
    mutant(
        "page-id-16-bits", "page ids are int32 (step)", "attend/decode/*high_ids*",
        attend_with(slots=lambda self, row: Plain.slots(self, replace(row, pages=row.pages % 65536))),
    ),
    mutant(
        "pages-of-16", "the page size is the problem's (kernels)", "attend/*page24*", attend_with(slots=pages_of_16),
    ),
    mutant(
        "group-0", "an attend reads the tables of its problem's group (step)", "attend/*group1*",
        attend_with(view=lambda self, step: step.groups[0]),
    ),
    mutant(
        "last-column", "every column of the page table may hold a live page (step)", "attend/mixed/full_table*",
        attend_with(slots=lambda self, row: Plain.slots(
            self, replace(row, pages=torch.cat([row.pages[:-1], row.pages[:1]]))
        )),
    ),
    mutant(
        "interleaved-heads", "q_heads / kv_heads neighbouring query heads share a key head (ops)", "attend/decode/gqa*",
        attend_with(spread=interleaved_heads),
    ),
    mutant(
        "wrong-value-slice", "value_in_key takes the first v_dim values of the key (ops)", "attend/mixed/value_in_key*",
        attend_with(values=lambda self, cache, row: self.keys(cache, row)[..., -self.problem.v_dim :]),
    ),
    mutant(
        "fnuz-as-ocp", "fp8 pages hold the flavour that kv_dtype names", "attend/mixed/*fnuz_pages*",
        attend_with(values=lambda self, cache, row: Plain.values(self, cache, row)
            * (2 if "fnuz" in self.problem.kv_dtype else 1)),
    ),
)  # fmt: skip


# ---- scores, sinks, results ------------------------------------------------------------------------------------


def cap_before_scale(self: Plain, q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("qhd,nhd->hqn", q.to(self.wide), k)
    cap = self.problem.softcap
    return (cap * torch.tanh(scores / cap) if cap else scores) * self.problem.scale


def cap_by_exp(self: Plain, q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("qhd,nhd->hqn", q.to(self.wide), k) * self.problem.scale
    cap = self.problem.softcap
    return (cap * (1 - 2 / ((scores.float() * (2 / cap)).exp() + 1))).to(self.wide) if cap else scores


def cap_after_mask(self: Plain, scores: Tensor, seen: Tensor, sinks: Any) -> tuple[Tensor, Tensor]:
    if cap := self.problem.softcap:
        scores = torch.where(seen, scores, -cap)
        seen = torch.ones_like(seen)
    return Plain.softmax(self, scores, seen, sinks)


def sinks_in_values(self: Plain, scores: Tensor, seen: Tensor, sinks: Any) -> tuple[Tensor, Tensor]:
    return Plain.softmax(self, scores if sinks is None else scores + sinks.to(self.wide)[:, None, None], seen, None)


def without_peak(self: Plain, scores: Tensor, seen: Tensor, sinks: Any) -> tuple[Tensor, Tensor]:
    weights = scores.masked_fill(~seen, -INF).exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.to(self.wide)[:, None, None].exp())
    return weights / total.masked_fill(total == 0, 1.0), total[..., 0].log()


def sinks_without_peak(self: Plain, scores: Tensor, seen: Tensor, sinks: Any) -> tuple[Tensor, Tensor]:
    weights, lse = Plain.softmax(self, scores, seen, None)
    if sinks is None:
        return weights, lse
    share = 1 / (1 + sinks.to(self.wide)[:, None].exp() * (-lse).exp())
    return weights * share[..., None], lse


def mean_where_nothing_seen(self: Plain, weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    out = Plain.weigh(self, weights, v, seen)
    return torch.where(seen.any(1)[:, None, None], out, v.nan_to_num(0.0, 0.0, 0.0).mean(0))


def garbage_in_padding(p: Any, run: Any, q: Tensor, cache: Any, step: Any, **kw: Any) -> Any:
    result = run(q, cache, step, **kw)
    out = result[0] if p.return_lse else result
    out[int(step.query_starts[-1]) :] = 1.0
    return result


def nan_where_nothing_seen(p: Any, run: Any, *args: Any, **kw: Any) -> Any:
    result = run(*args, **kw)
    out = result[0] if p.return_lse else result
    return (out / (out != 0).any(-1, keepdim=True), *result[1:]) if p.return_lse else out / (out != 0).any(-1, True)


def lse_as(change: Any) -> Make:
    return with_result("attend", lambda p, result: (result[0], change(result[1])) if p.return_lse else result)


def sinks_as(change: Any) -> Make:
    def call(p: Any, run: Any, *args: Any, sinks: Any = None, **kw: Any) -> Any:
        return run(*args, **kw, **({} if sinks is None else {"sinks": change(sinks)}))

    return with_call("attend", call)


def sums_in_bf16(self: Plain, weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    right = Plain.weigh(self, weights, v, seen)
    if self.problem.dtype != "bfloat16":
        return right
    total, v = torch.zeros_like(right, dtype=torch.bfloat16), v.masked_fill(~seen.any(0)[:, None, None], 0.0)
    for n in range(len(v)):
        total = total + (weights[:, :, n].T[..., None] * v[n]).bfloat16()
    return total


def scores_in_bf16(self: Plain, q: Tensor, k: Tensor) -> Tensor:
    if self.problem.dtype != "bfloat16":
        return Plain.scores(self, q, k)
    total = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=torch.bfloat16)
    for d in range(q.shape[2]):
        total = total + q[:, :, d].T[..., None] * k[:, :, d].T.bfloat16()[:, None]
    return total.to(self.wide) * self.problem.scale


def executed_in(dtype: torch.dtype, only: str) -> Make:
    """Attention that computes in `dtype`, whatever the problem says, where the problem's dtype is `only`."""

    def init(self: Plain, problem: Any) -> None:
        PlainAttend.__init__(self, problem)
        self.wide = dtype if problem.dtype == only else self.wide

    def lse_of_dtype(self: Plain, *args: Any, **given: Any) -> Any:
        result = Plain.__call__(self, *args, **given)
        wide = torch.float64 if only == "float64" else torch.float32
        return (result[0], result[1].to(wide)) if self.problem.return_lse else result

    return attend_with(__init__=init, __call__=lse_of_dtype)


RESULTS = (
    mutant(
        "zero-times-nan", "masking covers V as well as scores: 0 times NaN (ops)", "attend/decode/*garbage_tail*",
        attend_with(weigh=lambda self, weights, v, seen: torch.einsum("hqn,nhd->qhd", weights, v)),
    ),
    mutant(
        "scale-by-head-size", "the scale is the problem's (kernels)", "attend/mixed/*",
        with_problem("attend", lambda p: {"scale": p.qk_dim**-0.5}),
    ),
    mutant("softcap-ignored", "a soft cap is applied (ops)", "attend/*softcap*",
           with_problem("attend", lambda p: {"softcap": 0.0})),
    mutant("softcap-before-scale", "the order is scale, then soft cap (ops)", "attend/*softcap*",
           attend_with(scores=cap_before_scale)),
    mutant("softcap-cancels", "a cap far above the scores leaves them nearly as they are", "attend/*softcap50*-f32",
           attend_with(scores=cap_by_exp)),
    mutant("softcap-after-mask", "the order is soft cap, then mask (ops)", "attend/*softcap*",
           attend_with(softmax=cap_after_mask)),
    mutant("peak-not-subtracted", "scores as large as f32 holds them are legal", "attend/mixed/large_scores*",
           attend_with(softmax=without_peak)),
    mutant("sinks-overflow", "sinks take part in the peak", "attend/mixed/sinks_extreme*",
           attend_with(softmax=sinks_without_peak)),
    mutant("sinks-twice", "sinks join the denominator once (ops)", "attend/mixed/sinks*",
           sinks_as(lambda sinks: sinks + math.log(2))),
    mutant("sinks-ignored", "sinks join the denominator (ops)", "attend/mixed/sinks*",
           sinks_as(lambda sinks: sinks - INF)),
    mutant("sinks-as-bias", "sinks take part in the denominator only (ops)", "attend/mixed/sinks*",
           attend_with(softmax=sinks_in_values)),
    mutant("lse-base-2", "lse is natural (ops)", "attend/mixed/lse*", lse_as(lambda lse: lse / math.log(2))),
    mutant("lse-rounded", "lse is f32 (ops)", "attend/mixed/lse-bf16",
           lse_as(lambda lse: lse.bfloat16().to(lse.dtype))),
    mutant("lse-of-nothing", "lse is -inf where no key is seen (ops)", "attend/mixed/*lse*",
           lse_as(lambda lse: lse.clamp(min=-1e4))),
    mutant(
        "mean-of-values", "a query that sees no key gets 0, not mean(V) (ops)", "attend/mixed/no_visible_key*",
        attend_with(weigh=mean_where_nothing_seen),
    ),
    mutant(
        "nan-without-keys", "a query that sees no key gets exactly 0 (ops)", "attend/mixed/no_visible_key*",
        with_call("attend", nan_where_nothing_seen),
    ),
    mutant(
        "padding-garbage", "padding tokens get exactly 0 (ops)", "attend/mixed/*padding*",
        with_call("attend", garbage_in_padding),
    ),
    mutant("bf16-values", "values are summed in f32 (ops)", "attend/sums/values-bf16",
           attend_with(weigh=sums_in_bf16)),
    mutant("bf16-scores", "scores are summed in f32 (ops)", "attend/sums/scores-bf16",
           attend_with(scores=scores_in_bf16)),
    mutant(
        "bf16-under-f32", "a kernel that computes below the problem's dtype declines (kernels)", "attend/*-f32",
        executed_in(torch.bfloat16, "float32"),
    ),
    mutant(
        "f32-under-f64", "a kernel that computes below the problem's dtype declines (kernels)", "attend/*-f64",
        executed_in(torch.float32, "float64"), size="full",
    ),
)  # fmt: skip


# ---- merge_states, latent_attend -------------------------------------------------------------------------------


def merge_without_masking(p: Any, run: Any, out: Tensor, lse: Tensor, *, sinks: Any = None) -> Tensor:
    whole = lse.logsumexp(0) if sinks is None else torch.logaddexp(lse.logsumexp(0), sinks.to(lse.dtype))
    return ((lse - whole).exp()[..., None] * out.to(lse.dtype)).sum(0).nan_to_num(0.0).to(out.dtype)


def merge_sinks_per_part(p: Any, run: Any, out: Tensor, lse: Tensor, *, sinks: Any = None) -> Any:
    return run(out, lse) if sinks is None else run(out, lse, sinks=sinks + math.log(len(lse)))


def merge_nan_of_nothing(p: Any, run: Any, out: Tensor, lse: Tensor, **kw: Any) -> Any:
    return run(out, lse, **kw) / (lse > -INF).any(0)[..., None]


def latent_without_rope(
    problem: Any, q_nope: Tensor, q_rope: Tensor, cache: Any, w_uk: Any, w_uv: Any, step: Any
) -> Tensor:
    latent = torch.einsum("thd,hld->thl", q_nope.double(), dense(w_uk).double())
    q = torch.cat([latent, q_rope.double() * 0], -1)
    out = PlainAttend(replace(problem, dtype="float64"))(q, cache, step)
    return torch.einsum("thl,hvl->thv", out, dense(w_uv).double()).to(q_nope.dtype)


def whole_latent(run: Any) -> Make:
    """A kernel for the whole composite."""
    return with_added(recipe(
        "whole_latent_attend", "latent_attend", given_problem(run), layout=SLOTS_LAYOUT,
        handles=frozenset({"value_in_key"}),
    ))  # fmt: skip


PARTS = (
    mutant("reads-empty-part", "a part of lse -inf is not read (ops)", "merge_states/empty_rows*",
           with_call("merge_states", merge_without_masking)),
    mutant("nan-of-nothing", "an all-empty row gives 0 (ops)", "merge_states/empty_rows*",
           with_call("merge_states", merge_nan_of_nothing)),
    mutant("sinks-per-part", "merge_states adds sinks once (ops)", "merge_states/*sinks*",
           with_call("merge_states", merge_sinks_per_part)),
    mutant("unweighted", "parts are weighed by exp(lse) (ops)", "merge_states/two*",
           with_call("merge_states", lambda p, run, out, lse, **kw: run(out, lse.clamp(min=-1e9) * 0, **kw))),
    mutant("drops-rope", "a kernel may replace a composite whole, but computes what its parts do (ops)",
           "latent_attend/*", whole_latent(latent_without_rope)),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (*VISIBLE, *PLACES, *RESULTS, *PARTS)
