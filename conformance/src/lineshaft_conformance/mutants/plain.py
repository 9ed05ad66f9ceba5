"""Attention in plain torch over the cache of `lineshaft-torch`, right as it stands: mutants override a stage of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lineshaft_conformance.mutants.mutant import Make, with_kernel
from lineshaft_contract.problems import AttendProblem
from lineshaft_torch.arrays import accumulator, torch_dtype

INF = torch.inf


@dataclass(frozen=True)
class Row:
    """One row of a step: its tokens, how many keys it has, its pages, where they start, its queries' positions."""

    index: int
    tokens: slice
    context: int
    pages: torch.Tensor  # int64[P]
    starts: torch.Tensor  # int64[P]
    query: torch.Tensor  # int64[q_len]


class PlainAttend:
    """Bound to a problem; called as `attend` is. One row at a time, in the order of the contract."""

    def __init__(self, problem: AttendProblem) -> None:
        self.problem = problem
        self.wide = accumulator(torch_dtype(problem.dtype))

    def __call__(self, q: torch.Tensor, cache: Any, step: Any, **given: torch.Tensor) -> Any:
        out = q.new_zeros((q.shape[0], self.problem.q_heads, self.problem.v_dim))
        lse = torch.full(q.shape[:2], -INF, dtype=self.wide)
        for row in self.rows(step):
            at = (row.starts[:, None] + torch.arange(self.problem.page_size)).reshape(-1)
            k, v = self.keys(cache, row), self.values(cache, row)
            seen = self.visible(row, at, given)
            weights, logs = self.softmax(self.scores(q[row.tokens], k), seen, given.get("sinks"))
            out[row.tokens] = self.weigh(weights, v, seen).to(q.dtype)
            lse[row.tokens] = logs.T
        return (out, lse) if self.problem.return_lse else out

    def rows(self, step: Any) -> Iterator[Row]:
        bounds, view = step.query_starts.tolist(), self.view(step)
        usual = torch.arange(view.page_table.shape[1]) * self.problem.page_size
        for b in range(len(bounds) - 1):
            tokens, context = slice(bounds[b], bounds[b + 1]), int(view.context_lens[b])
            starts = view.page_starts[b].long() if self.problem.page_starts else usual
            query = torch.arange(context - (tokens.stop - tokens.start), context)
            if tokens.stop > tokens.start:
                yield Row(b, tokens, context, view.page_table[b].long(), starts, query)

    def view(self, step: Any) -> Any:
        return step.groups[self.problem.group]

    def slots(self, row: Row) -> torch.Tensor:
        """int64[n]: where the row's keys lie, null pages included."""
        return (row.pages[:, None] * self.problem.page_size + torch.arange(self.problem.page_size)).reshape(-1)

    def keys(self, cache: Any, row: Row) -> torch.Tensor:
        """[n, Hq, D]: each query head's key."""
        return self.spread(cache.arrays["k"][self.slots(row)].to(self.wide))

    def values(self, cache: Any, row: Row) -> torch.Tensor:
        """[n, Hq, Dv]: each query head's value."""
        if self.problem.value_in_key:
            return self.keys(cache, row)[..., : self.problem.v_dim]
        return self.spread(cache.arrays["v"][self.slots(row)].to(self.wide))

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self.problem.q_heads // self.problem.kv_heads, 1)

    def visible(self, row: Row, at: torch.Tensor, given: Any) -> torch.Tensor:
        """bool[q_len, n]."""
        query, p = row.query[:, None], self.problem
        held = (row.pages != 0).repeat_interleave(p.page_size)
        seen = (held & (at < row.context)).expand(len(query), -1)
        if p.causal:
            seen = seen & (at <= query)
        if p.window:
            seen = seen & (at > query - p.window)
        if p.key_ranges:
            ranges = given["key_ranges"][row.tokens]
            seen = seen & (at >= ranges[:, :1]) & (at < ranges[:, 1:])
        if p.ancestors:
            seen = seen & self.ancestor(given["ancestors"].view(torch.int32)[row.tokens], at - row.query[0])
        return seen

    def ancestor(self, bits: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
        index = relative.clamp(0, bits.shape[1] * 32 - 1)
        return ((bits[:, index // 32] >> (index % 32)) & 1).bool() | (relative < 0)

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """[Hq, q_len, n], scaled and capped."""
        scores = torch.einsum("qhd,nhd->hqn", q.to(self.wide), k) * self.problem.scale
        return self.problem.softcap * torch.tanh(scores / self.problem.softcap) if self.problem.softcap else scores

    def softmax(self, scores: torch.Tensor, seen: torch.Tensor, sinks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [Hq, q_len, n], lse [Hq, q_len])."""
        scores = scores.masked_fill(~seen, -INF)
        lse = scores.logsumexp(-1)
        whole = lse if sinks is None else torch.logaddexp(lse, sinks.to(self.wide)[:, None])
        return (scores - whole[..., None]).exp().nan_to_num(0.0), lse

    def weigh(self, weights: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """[q_len, Hq, Dv]; what no query sees is not read."""
        return torch.einsum("hqn,nhd->qhd", weights, v.masked_fill(~seen.any(0)[:, None, None], 0.0))


def attend_with(**stages: Any) -> Make:
    """Makes a mutant whose attend is a PlainAttend with these methods instead of its own."""
    kind = type("BrokenAttend", (PlainAttend,), stages)
    return with_kernel("attend", lambda problem, run: kind(problem))
