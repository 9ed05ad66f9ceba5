"""Attention by FlashInfer, where it is installed: planned on the host once a step, and run by every layer.

Entry points: `BatchDecodeWithPagedKVCacheWrapper` and `BatchPrefillWithPagedKVCacheWrapper` of FlashInfer 0.6, with the
buffers of their CUDA-graph mode. It is imported when a plan has chosen it, and compiles its kernels then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lineshaft_contract.kernels import HostPrepare
from lineshaft_contract.problems import AttendProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import HostStep, StepInputs, StepShape
from lineshaft_torch.arrays import torch_dtype
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.pages import SLOTS_LAYOUT
from lineshaft_triton.priority import DECLARED

NAME = "flashinfer_attend"
PACKAGE = "flashinfer"
HEAD_SIZES = (64, 128, 256)
WORKSPACE = 128 << 20
"""Bytes for partial results, as FlashInfer recommends; all wrappers of a session share them."""
TENSOR_CORES_FROM = 4
"""Query heads of a key head from which decode is quicker as a product of matrices."""

Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]


def supports(problem: AttendProblem) -> str | None:
    if problem.dtype not in ("bfloat16", "float16"):
        return f"computes in bfloat16 and float16, not in {problem.dtype}"
    if problem.kv_dtype != problem.dtype:
        return f"reads pages of the executed dtype, not of {problem.kv_dtype}"
    if problem.qk_dim not in HEAD_SIZES or problem.v_dim != problem.qk_dim:
        known = ", ".join(map(str, HEAD_SIZES))
        return f"has kernels for heads of {known}, keys as values, not {problem.qk_dim} and {problem.v_dim}"
    if problem.q_heads % problem.kv_heads:
        return f"groups query heads evenly, {problem.kv_heads} do not divide {problem.q_heads}"
    return None


@dataclass(frozen=True)
class Batch:
    """What FlashInfer plans a step by, for E entries.

    query_starts  int32[E + 1]; all T tokens belong to an entry, padding too
    page_starts   int32[E + 1], into `pages`
    pages         int32[n]
    last          int32[E]: keys on the last page of each
    dead          bool[T]: tokens whose result is 0
    """

    query_starts: Ints
    page_starts: Ints
    pages: Ints
    last: Ints
    dead: np.ndarray[Any, np.dtype[np.bool_]]


def make_batch(problem: AttendProblem, host: HostStep) -> Batch:
    """The entries of a step. In a decode step every token is one, so that a row without a query is none; else every row
    is one, and a last one holds the padding tokens. An entry without keys looks at the null page, and is dead."""
    tokens, starts = problem.tokens, host["query_starts"]
    table, lens = host[f"page_table.{problem.group}"], host[f"context_lens.{problem.group}"]
    row = np.searchsorted(starts[1:], np.arange(tokens), side="right")
    padding = row == problem.rows
    row[padding] = 0
    dead = padding | (lens[row] == 0)
    if problem.max_query == 1:
        return _entries(problem, np.arange(tokens + 1), table[row], np.where(dead, 0, lens[row]), dead)
    with_padding = np.append(starts, tokens)
    blank = np.zeros((1, table.shape[1]), table.dtype)
    return _entries(problem, with_padding, np.concatenate([table, blank]), np.append(lens, 0), dead)


def _entries(problem: AttendProblem, starts: Ints, table: Ints, lens: Ints, dead: Any) -> Batch:
    held = np.maximum(lens, 1)
    counts = -(-held // problem.page_size)
    used = np.arange(table.shape[1]) < counts[:, None]
    pages = np.where((lens == 0)[:, None], 0, table)[used]
    page_starts = np.concatenate([[0], np.cumsum(counts)])
    last = held - (counts - 1) * problem.page_size
    ints = [np.ascontiguousarray(each, np.int32) for each in (starts, page_starts, pages, last)]
    return Batch(ints[0], ints[1], ints[2], ints[3], dead)


class Wrapped:
    """A wrapper of FlashInfer over static buffers, for one problem of a session."""

    def __init__(self, problem: AttendProblem, session: Any) -> None:
        self._problem, self._layer = problem, session.layer
        self._decode = problem.max_query == 1
        entries = problem.tokens if self._decode else problem.rows + 1
        device = session.device
        self._dead = torch.ones(problem.tokens, 1, 1, dtype=torch.bool, device=device)
        self._workspace = session.constant(PACKAGE, lambda: torch.zeros(WORKSPACE, dtype=torch.uint8, device=device))
        sizes = (entries + 1, entries + 1, entries * problem.pages, entries)
        self._buffers = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]
        self._wrapper = self._make_decode() if self._decode else self._make_prefill()
        self._planned: Any = None
        self._plan(largest(problem, entries))

    def _make_decode(self) -> Any:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        _, starts, pages, last = self._buffers
        group = self._problem.q_heads // self._problem.kv_heads
        return BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_cuda_graph=True, use_tensor_cores=group >= TENSOR_CORES_FROM,
            paged_kv_indptr_buffer=starts, paged_kv_indices_buffer=pages, paged_kv_last_page_len_buffer=last,
        )  # fmt: skip

    def _make_prefill(self) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        queries, starts, pages, last = self._buffers
        return BatchPrefillWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_cuda_graph=True, qo_indptr_buf=queries, paged_kv_indptr_buf=starts,
            paged_kv_indices_buf=pages, paged_kv_last_page_len_buf=last,
        )  # fmt: skip

    def prepare(self, host: HostStep) -> None:
        """Plan a step. FlashInfer stages its plan in pinned memory of its own, which the step before may still read."""
        if self._planned is not None:
            self._planned.synchronize()
        self._plan(make_batch(self._problem, host))

    def _plan(self, batch: Batch) -> None:
        problem = self._problem
        dtype = torch_dtype(problem.dtype)
        options: dict[str, Any] = {
            "logits_soft_cap": problem.softcap or None, "sm_scale": problem.scale, "q_data_type": dtype,
            "kv_data_type": dtype,
        }  # fmt: skip
        keys = [torch.from_numpy(each) for each in (batch.page_starts, batch.pages, batch.last)]
        heads = (problem.q_heads, problem.kv_heads, problem.qk_dim, problem.page_size)
        if self._decode:
            self._wrapper.plan(*keys, *heads, **options)
        else:
            self._wrapper.plan(torch.from_numpy(batch.query_starts), *keys, *heads, causal=True, **options)
        self._dead.copy_(torch.from_numpy(batch.dead).view(self._dead.shape))
        self._planned = self._layer.record()

    def attend(self, q: torch.Tensor, cache: Cache, step: StepInputs, *, out: torch.Tensor | None = None) -> Any:
        """q [T, Hq, D] over the pages of the step that was planned -> [T, Hq, D]."""
        problem = self._problem
        paged = tuple(
            cache.arrays[name].view(-1, problem.page_size, problem.kv_heads, problem.qk_dim) for name in ("k", "v")
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        return self._wrapper.run(q.contiguous(), paged, out=out).masked_fill_(self._dead, 0)


def largest(problem: AttendProblem, entries: int) -> Batch:
    """The step that takes most memory: every entry is as long as it can be, and the first holds all other queries."""
    share = max(1, problem.tokens // entries)
    starts = np.minimum(np.arange(entries + 1) * share, problem.tokens)
    starts[-1] = problem.tokens
    table = np.zeros((entries, problem.pages), np.int32)
    lens = np.full(entries, problem.pages * problem.page_size)
    return _entries(problem, starts, table, lens, np.ones(problem.tokens, np.bool_))


def _wrapped(problem: AttendProblem, session: Any) -> Wrapped:
    found: Wrapped = session.constant((NAME, problem), lambda: Wrapped(problem, session))
    return found


def bind(problem: AttendProblem, session: Any) -> Callable[..., Any]:
    return _wrapped(problem, session).attend


def prepare(problem: AttendProblem, shape: StepShape, session: Any) -> HostPrepare:
    return _wrapped(problem, session).prepare


def recipes() -> list[Recipe]:
    return [
        recipe(
            NAME, "attend", bind, out=True, layout=SLOTS_LAYOUT, priority=DECLARED, handles=frozenset({"softcap"}),
            supports=supports, prepare=prepare,
        )
    ]  # fmt: skip
