"""Attention on the host, where a kernel may read lengths: only live keys are gathered, rows of like length together.

What to gather is planned once per step and shared by all layers. Slots past a row's context are never read, or zeroed
once gathered, so that whatever they hold cannot leak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lineshaft_contract.problems import AttendProblem, KVProblem
from lineshaft_contract.sessions import Cache
from lineshaft_contract.steps import HostStep, StepInputs, StepShape
from lineshaft_cpu.priority import TORCH
from lineshaft_torch.arrays import accumulator, torch_dtype
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_torch.kernels.attend import softmax_with_sinks
from lineshaft_torch.pages import SLOTS_LAYOUT

HostArray = np.ndarray[Any, Any]
FEATURES = frozenset({"causal", "window", "softcap", "sinks", "value_in_key", "return_lse"})

SPARE_KEYS = 384
"""Decode rows share a call as long as padding them to one length adds at most this many keys, about a call's cost."""


@dataclass(frozen=True)
class Rows:
    """Rows attended together: n rows of Q queries and K keys each.

    tokens  where the queries stand among the T tokens: a slice, or int64[n * Q]
    slots   where the keys lie in the cache: a slice, or int64[n * K]; short rows repeat a live slot of their own
    pages   int64[n * P]: whole pages to gather instead, so that K = P * page_size; `unseen` int64[*] are the keys among
            them that nobody has written yet, to be zeroed
    mask    [n, 1, 1, K] or [1, 1, Q, K], 0 or -inf, in the executed dtype; None: every key is visible
    causal  the mask is the plain causal one (Q = K), and `mask` is None
    dead    bool[n * Q]: queries without a visible key; None: there are none
    """

    n: int
    queries: int
    tokens: slice | torch.Tensor
    slots: slice | torch.Tensor
    mask: torch.Tensor | None = None
    causal: bool = False
    dead: torch.Tensor | None = None
    pages: torch.Tensor | None = None
    unseen: torch.Tensor | None = None


@dataclass(frozen=True)
class StepPlan:
    """The planner's rows of a step, and whether some of its tokens belong to none of them, as they see no key."""

    groups: tuple[Rows, ...]
    gaps: bool


class Planner:
    """Plans a step from the host's view of its lengths: before submission where it is asked to (`prepare`), else at the
    first call that finds the lengths changed.

    `elsewhere` >= 0 leaves out what another kernel attends: rows of one query, rows of at most so many keys, padding.
    """

    def __init__(self, problem: AttendProblem, elsewhere: int = -1) -> None:
        self._problem, self._elsewhere = problem, elsewhere
        self._dtype = torch_dtype(problem.dtype)
        self._step: StepInputs | None = None
        self._views: tuple[HostArray, ...] = ()
        self._seen = b""
        self._prepared = False
        self._plan = StepPlan((), True)

    def prepare(self, host: HostStep) -> None:
        """Plan the step that is about to be submitted."""
        g = self._problem.group
        self._plan = self._make(
            self._problem.tokens, host["query_starts"], host[f"context_lens.{g}"], host[f"page_table.{g}"]
        )
        self._prepared = True

    def plan(self, step: StepInputs, tokens: int) -> StepPlan:
        """The plan of the step under way."""
        if self._prepared:
            return self._plan
        if step is not self._step:
            group = step.groups[self._problem.group]
            self._step, self._seen = step, b""
            self._views = tuple(t.numpy() for t in (step.query_starts, group.context_lens, group.page_table))
        content = b"".join(view.tobytes() for view in self._views)
        if content != self._seen:
            self._plan, self._seen = self._make(tokens, *self._views), content
        return self._plan

    def _make(self, tokens: int, starts: HostArray, lens: HostArray, table: HostArray) -> StepPlan:
        decode: list[tuple[int, int]] = []
        groups: list[Rows] = []
        begins, counts, contexts = starts[:-1].tolist(), np.diff(starts).tolist(), lens.tolist()
        holes, ours = self._holes(lens, table), tokens
        for b, (begin, count, context) in enumerate(zip(begins, counts, contexts, strict=True)):
            if self._elsewhere >= 0 and (count == 1 or context <= self._elsewhere):
                ours -= count
                continue
            if count == 1 and context and not holes[b]:
                decode.append((self._visible(context), b))
            elif count and context:
                groups += self._chunk(begin, count, context, table[b])
        groups += [self._decode(np.asarray(rows), starts, lens, table) for rows in alike(decode)]
        if self._elsewhere >= 0:
            ours -= tokens - int(starts[-1])
        return StepPlan(tuple(groups), sum(rows.n * rows.queries for rows in groups) < ours)

    def _holes(self, lens: HostArray, table: HostArray) -> list[bool]:
        """Which rows lack a page below their context: page 0 stands for keys that nobody sees."""
        used = np.arange(table.shape[1]) * self._problem.page_size < lens[:, None]
        holes: list[bool] = ((table == 0) & used).any(1).tolist()
        return holes

    def _visible(self, context: int) -> int:
        """Keys that the last query of a row may see."""
        return min(context, self._problem.window) if self._problem.window else context

    def _decode(self, rows: HostArray, starts: HostArray, lens: HostArray, table: HostArray) -> Rows:
        """Rows of one query each; shorter rows are padded with their own first page or visible key, masked."""
        if len(rows) > 1 and not self._problem.window:
            return self._decode_pages(rows, starts, lens[rows], table[rows])
        last = lens[rows].astype(np.int64)
        first = last - np.asarray([self._visible(n) for n in last.tolist()])
        offset = np.arange(int((last - first).max()))
        inside = offset < (last - first)[:, None]
        slots = self._slots(table[rows], first[:, None] + np.where(inside, offset, 0))
        mask = None if inside.all() else self._additive(inside)[:, None, None]
        return Rows(len(rows), 1, _run_of(starts[:-1][rows].astype(np.int64)), _run_of(slots.reshape(-1)), mask)

    def _decode_pages(self, rows: HostArray, starts: HostArray, lens: HostArray, table: HostArray) -> Rows:
        """As _decode, by whole pages, which are fewer and longer pieces to gather than slots."""
        size = self._problem.page_size
        used = -(-lens // size)
        column = np.arange(int(used.max()))
        live = column < used[:, None]
        pages = np.where(live, table[:, : len(column)], table[:, :1]).astype(np.int64)
        inside = np.arange(len(column) * size) < lens[:, None]
        written = lens[:, None] - np.where(live, column, 0) * size  # slots of each gathered page that hold keys
        unseen = np.flatnonzero(np.arange(size) >= written[..., None])
        return Rows(
            len(rows), 1, _run_of(starts[:-1][rows].astype(np.int64)), slice(0, 0),
            None if inside.all() else self._additive(inside)[:, None, None],
            pages=torch.from_numpy(pages.reshape(-1)), unseen=torch.from_numpy(unseen) if len(unseen) else None,
        )  # fmt: skip

    def _chunk(self, begin: int, count: int, context: int, pages: HostArray) -> list[Rows]:
        """One row of any queries and pages, or none if it sees no key. Keys that no query sees are not gathered."""
        p = self._problem
        query = np.arange(context - count, context)[:, None]
        first = max(0, context - count - p.window + 1) if p.window else 0
        key = np.arange(first, context)
        key = key[pages[key // p.page_size] != 0]
        if not len(key):
            return []
        slots = _run_of(self._slots(pages[None], key[None])[0])
        tokens = slice(begin, begin + count)
        if p.causal and not p.window and count == len(key):
            return [Rows(1, count, tokens, slots, causal=True)]
        visible = (key <= query) if p.causal else np.ones((count, len(key)), bool)
        if p.window:
            visible &= key > query - p.window
        dead = ~visible.any(1)
        mask = None if visible.all() else self._additive(visible)[None, None]
        return [Rows(1, count, tokens, slots, mask, dead=torch.from_numpy(dead) if dead.any() else None)]

    def _slots(self, pages: HostArray, positions: HostArray) -> HostArray:
        """pages int32[n, P], positions int64[n, K] -> the slot of each position, int64[n, K]."""
        size = self._problem.page_size
        page = np.take_along_axis(pages, positions // size, 1).astype(np.int64)
        return page * size + positions % size

    def _additive(self, visible: HostArray) -> torch.Tensor:
        return torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(~visible), -torch.inf)


def alike(lengths: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Rows, given as (keys, row), in groups of like length: padding a group adds at most SPARE_KEYS keys."""
    group: list[int] = []
    longest = spare = 0
    for keys, row in sorted(lengths, reverse=True):
        spare += longest - keys
        if group and spare > SPARE_KEYS:
            yield sorted(group)
            group = []
        if not group:
            longest, spare = keys, 0
        group.append(row)
    if group:
        yield sorted(group)


def _run_of(index: HostArray) -> slice | torch.Tensor:
    """A slice where `index` counts up by one, which needs no gather; else the index as a tensor."""
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and (np.diff(index) == 1).all():
        return slice(first, last + 1)
    return torch.from_numpy(index)


def _take(array: torch.Tensor, where: slice | torch.Tensor) -> torch.Tensor:
    return array[where] if isinstance(where, slice) else array.index_select(0, where)


def _gather(array: torch.Tensor, rows: Rows, page_size: int) -> torch.Tensor:
    """array [N * page, Hkv, D] -> the keys or values of `rows` [n * K, Hkv, D]."""
    if rows.pages is None:
        return _take(array, rows.slots)
    found = array.view(-1, page_size * array.shape[1] * array.shape[2]).index_select(0, rows.pages)
    found = found.view(-1, *array.shape[1:])
    return found if rows.unseen is None else found.index_fill_(0, rows.unseen, 0)


def attend(
    problem: AttendProblem,
    planner: Planner,
    q: torch.Tensor,
    cache: Cache,
    step: StepInputs,
    *,
    sinks: torch.Tensor | None = None,
    out: Any = None,
) -> Any:
    """q [T, Hq, D] -> out [T, Hq, Dv], or (out, lse [T, Hq] in the accumulation dtype)."""
    plan = planner.plan(step, q.shape[0])
    result, lse = results(problem, q, out)
    if plan.gaps:
        clear(result, lse)
    attend_rows(problem, plan.groups, q, cache, result, lse, sinks)
    return result if lse is None else (result, lse)


def results(problem: AttendProblem, q: torch.Tensor, out: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where the result [T, Hq, Dv] and lse [T, Hq] go, unset; lse is None unless the problem asks for it."""
    if problem.return_lse:
        return out or (_unset(problem, q), torch.empty(q.shape[:2], dtype=accumulator(q.dtype)))
    return _unset(problem, q) if out is None else out, None


def clear(result: torch.Tensor, lse: torch.Tensor | None) -> None:
    """What tokens that see no key are given."""
    result.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)


def _unset(problem: AttendProblem, q: torch.Tensor) -> torch.Tensor:
    return q.new_empty((*q.shape[:2], problem.v_dim))


def attend_rows(
    problem: AttendProblem,
    groups: Sequence[Rows],
    q: torch.Tensor,
    cache: Cache,
    result: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """Attend the rows of `groups` and write what is found to their tokens of `result` and `lse`."""
    explicit = bool(problem.softcap) or problem.sinks or problem.return_lse
    for rows in groups:
        keys = _gather(cache.arrays["k"], rows, problem.page_size)
        in_keys = problem.value_in_key
        values = keys[..., : problem.v_dim] if in_keys else _gather(cache.arrays["v"], rows, problem.page_size)
        queries = _take(q, rows.tokens)
        if explicit:
            found, logs = _explicit(problem, rows, queries, keys, values, sinks)
            if lse is not None:
                lse[rows.tokens] = logs
        else:
            found = _fused(problem, rows, queries, keys, values)
        result[rows.tokens] = found if rows.dead is None else found.masked_fill(rows.dead[:, None, None], 0.0)


def _fused(
    problem: AttendProblem, rows: Rows, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """q [n * Q, Hq, D], keys [n * K, Hkv, D], values [n * K, Hkv, Dv] -> [n * Q, Hq, Dv], by torch's fused attention.

    In decode the heads of a group stand in the place of queries, so that each key is read once for all of them.
    """
    keys = keys.view(rows.n, -1, *keys.shape[1:]).transpose(1, 2)
    values = values.view(rows.n, -1, *values.shape[1:]).transpose(1, 2)
    if rows.queries == 1:
        grouped = q.view(rows.n, problem.kv_heads, -1, problem.qk_dim)
        found = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=rows.mask, scale=problem.scale)
        return found.reshape(rows.n, problem.q_heads, problem.v_dim)
    found = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=rows.mask, is_causal=rows.causal, scale=problem.scale,
        enable_gqa=problem.q_heads != problem.kv_heads,
    )  # fmt: skip
    return found[0].transpose(0, 1)


def _explicit(
    problem: AttendProblem,
    rows: Rows,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _fused, step by step, for what the fused attention lacks; also lse [n * Q, Hq]."""
    wide = accumulator(q.dtype)
    q_heads = q.to(wide).view(rows.n, rows.queries, problem.kv_heads, -1, problem.qk_dim)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q_heads, keys.to(wide).view(rows.n, -1, *keys.shape[1:])) * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if rows.mask is not None:
        scores = scores + rows.mask[:, :, None].to(wide)
    if rows.causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=wide).triu_(1)
    weights, lse = softmax_with_sinks(scores, sinks)
    found = torch.einsum("bhgqk,bkhd->bqhgd", weights, values.to(wide).view(rows.n, -1, *values.shape[1:]))
    logs = lse.permute(0, 3, 1, 2).reshape(-1, problem.q_heads)
    return found.reshape(-1, problem.q_heads, problem.v_dim).to(q.dtype), logs


def supports(problem: AttendProblem | KVProblem) -> str | None:
    if problem.kv_dtype != problem.dtype:
        return f"works on pages of the executed dtype {problem.dtype}, not {problem.kv_dtype}"
    return None


def shared_planner(problem: AttendProblem, session: Any, elsewhere: int = -1) -> Planner:
    """One planner per session and problem, as all layers ask for the same."""
    key = ("cpu_attend", problem, elsewhere)
    planner: Planner = session.constant(key, lambda: Planner(problem, elsewhere))
    return planner


def _bind(problem: AttendProblem, session: Any) -> Any:
    return partial(attend, problem, shared_planner(problem, session))


def _prepare(problem: AttendProblem, shape: StepShape, session: Any) -> Any:
    return shared_planner(problem, session).prepare


def recipes() -> Iterator[Recipe]:
    yield recipe(
        "cpu_attend", "attend", _bind, out=True, layout=SLOTS_LAYOUT, priority=TORCH, handles=FEATURES,
        supports=supports, prepare=_prepare,
    )  # fmt: skip
