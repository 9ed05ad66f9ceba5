"""Portable attention over a cache of the "slots" layout: static shapes, any device, for conformance and small sizes.

It gathers every page of every row and holds all scores at once, so it declines problems above a memory budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import StepInputs
from lineshaft_torch.arrays import accumulator, torch_dtype
from lineshaft_torch.bound import Recipe, recipe, stateless
from lineshaft_torch.pages import SLOTS_LAYOUT, movable

FEATURES = frozenset(
    {"causal", "window", "softcap", "sinks", "value_in_key", "return_lse", "page_starts", "key_ranges", "ancestors"}
)
MEMORY_MIB = 256
"""Default budget for the temporaries of one portable attend."""


def temporary_bytes(problem: AttendProblem) -> int:
    """Bytes that one call holds at its peak: scores and weights [B, Hq, Q, K], keys and values [B, K, Hkv, D], each as
    stored and widened."""
    keys, wide = problem.pages * problem.page_size, 8 if problem.dtype == "float64" else 4
    queries = problem.max_query or problem.tokens
    scores = problem.rows * problem.q_heads * queries * keys
    pages = problem.rows * keys * problem.kv_heads * (problem.qk_dim + problem.v_dim)
    return wide * (3 * scores + 2 * pages)


def supports(problem: AttendProblem, budget_mib: int = MEMORY_MIB) -> str | None:
    needed = temporary_bytes(problem)
    if needed > budget_mib * 2**20:
        return f"holds all scores at once: {needed >> 20} MiB of temporaries exceed its budget of {budget_mib} MiB"
    return None


@dataclass(frozen=True)
class Ragged:
    """Where each token of a step belongs.

    row, index   int64[T]: the token's row, and its place among the row's queries
    live         bool[T]: not a padding token
    query_len    int64[B]
    """

    row: torch.Tensor
    index: torch.Tensor
    live: torch.Tensor
    query_len: torch.Tensor

    @classmethod
    def of(cls, query_starts: torch.Tensor, tokens: int) -> Ragged:
        starts = query_starts.long()
        at = torch.arange(tokens, device=starts.device)
        row = torch.searchsorted(starts[1:], at, right=True).clamp(max=starts.shape[0] - 2)
        return cls(row, at - starts[row], at < starts[-1], starts.diff())


def attend(
    problem: AttendProblem,
    q: torch.Tensor,
    cache: Cache,
    step: StepInputs,
    *,
    sinks: torch.Tensor | None = None,
    key_ranges: torch.Tensor | None = None,
    ancestors: torch.Tensor | None = None,
) -> Any:
    """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse [T, Hq] in the accumulation dtype).

    Stages: gather pages per row, scatter queries to [B, Q], score, mask, softmax, weigh, gather back to [T].
    """
    view = step.groups[problem.group]
    ragged = Ragged.of(step.query_starts, q.shape[0])
    keys, values = gather_pages(problem, cache, view.page_table)
    queries = min(problem.max_query or q.shape[0], q.shape[0])
    at = (step.query_starts[:-1, None].long() + torch.arange(queries, device=q.device)).clamp(max=q.shape[0] - 1)
    group = problem.q_heads // problem.kv_heads
    wide = accumulator(torch_dtype(problem.dtype))
    q_rows = q[at].to(wide).unflatten(2, (problem.kv_heads, group))  # [B, Q, Hkv, G, D]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q_rows, keys.to(wide)) * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    visible, relative = visibility(problem, view, ragged.query_len, queries, keys.shape[1])
    if key_ranges is not None:
        visible &= in_range(relative + (view.context_lens - ragged.query_len)[:, None], key_ranges[at])
    if ancestors is not None:
        visible &= is_ancestor(relative, ancestors.view(torch.int32)[at])
    scores = scores.masked_fill_(~visible[:, None, None], -torch.inf)
    weights, lse = softmax_with_sinks(scores, sinks)
    values = values.to(wide).masked_fill(~visible.any(1)[:, :, None, None], 0.0)
    rows = torch.einsum("bhgqk,bkhd->bqhgd", weights, values).flatten(2, 3)
    index = ragged.index.clamp(0, queries - 1)
    result = rows[ragged.row, index].masked_fill(~ragged.live[:, None, None], 0.0).to(q.dtype)
    if not problem.return_lse:
        return result
    return result, lse.flatten(1, 2)[ragged.row, :, index].masked_fill(~ragged.live[:, None], -torch.inf)


def gather_pages(problem: AttendProblem, cache: Cache, page_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """page_table int32[B, P] -> keys [B, K, Hkv, D] and values [B, K, Hkv, Dv] with K = P * page."""
    rows, pages = page_table.shape

    def gathered(array: torch.Tensor) -> torch.Tensor:
        paged = array.view(-1, problem.page_size, *array.shape[1:])
        found = movable(paged).index_select(0, page_table.reshape(-1)).view(array.dtype)
        return found.view(rows, pages * problem.page_size, *array.shape[1:])

    keys = gathered(cache.arrays["k"])
    return keys, keys[..., : problem.v_dim] if problem.value_in_key else gathered(cache.arrays["v"])


def visibility(
    problem: AttendProblem, view: Any, query_len: torch.Tensor, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bool[B, Q, K]: whether a row's query looks at a key, int64[B, K]: key positions after the row's first query).

    Keys on page 0 are looked at by none.
    """
    at = torch.arange(keys, device=query_len.device)
    held = (view.page_table != 0).repeat_interleave(problem.page_size, 1)
    if problem.page_starts:
        key = (view.page_starts.long()[:, :, None] + at[: problem.page_size]).flatten(1)
    else:
        key = at.expand(query_len.shape[0], keys)
    lens, index = view.context_lens.long()[:, None], torch.arange(queries, device=at.device)
    query = (lens - query_len[:, None] + index)[:, :, None]
    visible = (held & (key < lens))[:, None] & (index < query_len[:, None])[:, :, None]
    if problem.causal:
        visible = visible & (key[:, None] <= query)
    if problem.window:
        visible = visible & (key[:, None] > query - problem.window)
    return visible, key - (lens - query_len[:, None])


def in_range(key: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """key int64[B, K], ranges int32[B, Q, 2] -> bool[B, Q, K]: start <= key < stop."""
    return (key[:, None] >= ranges[..., :1]) & (key[:, None] < ranges[..., 1:])


def is_ancestor(relative: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """relative int64[B, K], bits int32[B, Q, words] -> bool[B, Q, K]: bit `relative` is set, or it is negative."""
    index = relative.clamp(0, bits.shape[2] * 32 - 1)[:, None].expand(-1, bits.shape[1], -1)
    chosen = (bits.gather(2, index // 32) >> (index % 32)) & 1
    return (chosen == 1) | (relative < 0)[:, None]


def softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [B, Hkv, G, Q, K] with -inf where masked, sinks [Hq] -> (weights as scores, lse [B, Hkv, G, Q]).

    A query without a visible key has weights 0 and lse -inf. Sinks take part in the weights, not in lse.
    """
    top = scores.amax(-1, keepdim=True)
    blind = top == -torch.inf
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(1, scores.shape[1], scores.shape[2], 1, 1)
        top = torch.maximum(top, sinks)
    top = top.masked_fill(blind, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    share = total if sinks is None else total + torch.exp(sinks - top)
    return weights / share.masked_fill(blind, 1.0), lse


def merge_states(
    parts: torch.Tensor, lse: torch.Tensor, *, sinks: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """parts [n, T, H, D], lse [n, T, H] over disjoint keys -> [T, H, D]; sinks [H] count here; all-empty gives 0."""
    wide = accumulator(parts.dtype)
    top = lse.to(wide).amax(0)
    if sinks is not None:
        top = torch.maximum(top, sinks.to(wide))
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(lse.to(wide) - top)
    total = weights.sum(0)
    if sinks is not None:
        total = total + torch.exp(sinks.to(wide) - top)
    weights = (weights / total.masked_fill(total == 0, 1.0))[..., None]
    merged = (parts.to(wide).masked_fill(weights == 0, 0.0) * weights).sum(0).to(parts.dtype)
    return merged if out is None else out.copy_(merged)


def recipes(budget_mib: int = MEMORY_MIB) -> list[Recipe]:
    def bind(problem: AttendProblem, session: Any) -> Any:
        return partial(attend, problem)

    return [
        recipe(
            "torch_attend", "attend", bind, layout=SLOTS_LAYOUT, handles=FEATURES,
            supports=partial(supports, budget_mib=budget_mib),
        ),
        recipe("torch_merge_states", "merge_states", stateless(merge_states), out=True, handles=frozenset({"sinks"})),
    ]  # fmt: skip
