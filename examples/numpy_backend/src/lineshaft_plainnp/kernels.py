"""A kernel for each op that the contract requires and for edits of logits: float32, dense weights, canonical pages."""

from functools import partial
from typing import Any

import numpy as np

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.rope import rope_frequencies

Array = np.ndarray[Any, Any]


def plain_kernels(backend: str, query_block: int) -> list[Kernel]:
    """All kernels; `attend` takes at most `query_block` queries of a row at once."""

    def make(op: str, run: Any, layout: str = "", handles: str = "", **options: str) -> Kernel:
        return Kernel(
            f"{backend}_{op}", op, backend, lambda problem, session: partial(run, problem), layout=layout,
            handles=frozenset(handles.split()), supports=declines, options=options,
        )  # fmt: skip

    attends = "causal window softcap sinks value_in_key return_lse page_starts"
    return [
        make("add", lambda p, x, y: x + y),
        make("concat", lambda p, xs, dim: np.concatenate(xs, dim)),
        make("gather_rows", lambda p, x, rows: x[rows]),
        make("silu_mul", lambda p, x: gated(x, lambda gate: gate / (1 + np.exp(-gate)))),
        make("gelu_mul", lambda p, x: gated(x, lambda g: g / 2 * (1 + np.tanh(0.7978845608 * (g + 0.044715 * g**3))))),
        make("rope", rope, handles="interleaved"),
        make("embed", embed, "plain_dense"),
        make("linear", lambda p, x, w, bias=0.0: x @ w.arrays["data"].T + bias, "plain_dense", "bias"),
        make("rms_norm", rms_norm, "plain_dense"),
        make("write_kv", write_kv, "plain_pages"),
        make("attend", partial(attend, query_block), "plain_pages", attends, query_block=str(query_block)),
        make("argmax", argmax),
        make("apply_logits", apply_logits, handles="mask edits"),
        make("sample", sample),
        make("logprobs", logprobs),
    ]


def declines(problem: Any) -> str | None:
    """The reason to decline a problem of another dtype: NumPy has no fast products of narrower floats."""
    others = {getattr(problem, name, "float32") for name in ("dtype", "kv_dtype")} - {"float32"}
    return f"NumPy computes in float32 here, not in {' or '.join(sorted(others))}" if others else None


def gated(x: Array, activation: Any) -> Array:
    gate, up = np.split(x, 2, -1)
    with np.errstate(over="ignore"):  # where a power overflows, the limit is right
        out: Array = activation(gate) * up
    return out


def embed(p: Any, ids: Array, table: Any, vocab_start: Array) -> Array:
    data, local = table.arrays["data"], ids - vocab_start
    inside = (local >= 0) & (local < len(data))
    return np.where(inside[:, None], data[np.where(inside, local, 0)], np.float32(0))


def rms_norm(p: Any, x: Array, w: Any) -> Array:
    out: Array = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + p.eps) * w.arrays["data"]
    return out


def rope(p: Any, q: Array, k: Array, positions: Array) -> tuple[Array, Array]:
    angles = positions.astype(np.float32)[:, None, None] * rope_frequencies(p).astype(np.float32)
    cos, sin, half = np.cos(angles), np.sin(angles), p.dim // 2
    neighbours, halves = (slice(0, p.dim, 2), slice(1, p.dim, 2)), (slice(0, half), slice(half, p.dim))
    a, b = ((..., part) for part in (neighbours if p.interleaved else halves))
    out = q.copy(), k.copy()
    for x, turned in zip((q, k), out, strict=True):
        turned[a], turned[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def by_slot(cache: Any, name: str) -> Array:
    """A view of pages [N, page, Hkv, D] as slots [N * page, Hkv, D]."""
    pages: Array = cache.arrays[name]
    return pages.reshape(-1, *pages.shape[2:])


def write_kv(p: Any, cache: Any, k: Array, v: Array | None, step: Any) -> Any:
    """In place."""
    for name, new in {"k": k, "v": v}.items():
        if new is not None:
            by_slot(cache, name)[step.groups[p.group].slots] = new
    return cache


def attend(block: int, p: Any, q: Array, cache: Any, step: Any, *, sinks: Array | None = None) -> Any:
    """Block by block of each row's queries; a block gathers the keys that one of its queries sees, and no other."""
    view, bounds = step.groups[p.group], step.query_starts.tolist()
    keys = by_slot(cache, "k")
    values = keys[..., : p.v_dim] if p.value_in_key else by_slot(cache, "v")
    pages, offsets = view.page_table.astype(np.int64), np.arange(p.page_size)
    starts = view.page_starts if p.page_starts else np.tile(np.arange(p.pages) * p.page_size, (p.rows, 1))
    all_at, all_slots = ((first[..., None] + offsets).reshape(p.rows, -1) for first in (starts, pages * p.page_size))
    out = np.zeros((p.tokens, p.q_heads, p.v_dim), np.float32)
    lse = np.full((p.tokens, p.q_heads), -np.inf, np.float32)
    for row, (at, slots, context) in enumerate(zip(all_at, all_slots, view.context_lens, strict=True)):
        for first in range(bounds[row], bounds[row + 1], block):
            last = min(first + block, bounds[row + 1])
            query = (context - bounds[row + 1] + np.arange(first, last))[:, None]
            seen = (slots >= p.page_size) & (at < context) & ((at <= query) | (not p.causal))  # page 0 is null
            seen &= (at > query - p.window) | (not p.window)
            used = np.flatnonzero(seen.any(0))
            k, v = keys[slots[used]], values[slots[used]]
            out[first:last], lse[first:last] = softmax(p, q[first:last], k, v, seen[:, used], sinks)
    return (out, lse) if p.return_lse else out


def softmax(p: Any, q: Array, k: Array, v: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
    """q [t, Hq, D], k [n, Hkv, D], v [n, Hkv, Dv], seen [t, n] -> (out [t, Hq, Dv], lse [t, Hq])."""
    (t, n), share = seen.shape, p.q_heads // p.kv_heads * len(q)  # a key head's queries lie next to each other
    queries = q.transpose(1, 0, 2).reshape(p.kv_heads, share, p.qk_dim)
    scores = (queries @ k.transpose(1, 2, 0)).reshape(p.q_heads, t, n) * p.scale
    if p.softcap:
        scores = p.softcap * np.tanh(scores / p.softcap)
    scores = np.where(seen, scores, np.float32(-np.inf))
    floor = np.float32(-np.inf) if sinks is None else sinks[:, None, None]
    peak = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), floor)
    blind = ~seen.any(-1, keepdims=True)
    peak = np.where(blind, np.float32(0), peak)
    weights = np.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    out = (weights.reshape(p.kv_heads, share, n) @ v.transpose(1, 0, 2)).reshape(p.q_heads, t, p.v_dim)
    with np.errstate(divide="ignore", over="ignore"):  # where no key is seen
        whole = np.where(blind, 1, total + np.exp(floor - peak))
        return (out / whole).transpose(1, 0, 2), (np.log(total) + peak)[..., 0].T


def argmax(p: Any, logits: Array) -> Array:
    best = np.argmax(logits, -1)  # the first of equals; a NaN counts as the largest
    return np.where(np.take_along_axis(logits, best[:, None], 1)[:, 0] > -np.inf, best, -1).astype(np.int32)


def sample(p: Any, logits: Array, params: Any, u: Array) -> Array:
    """Greedy rows cost no more than argmax; the others are sorted, and summed in float64."""
    out = argmax(p, logits)
    rows = np.flatnonzero((params["temperature"] != 0) & (out >= 0))
    warmth, top_k, top_p, min_p = (params[name][rows, None] for name in ("temperature", "top_k", "top_p", "min_p"))
    x = logits[rows].astype(np.float64)
    order = np.argsort(-x, -1, kind="stable")
    x = np.take_along_axis(x, order, 1)
    kept = np.exp((x - x[:, :1]) / warmth)  # the largest is 1
    kept[(np.arange(p.vocab) >= top_k) & (top_k > 0)] = 0
    before = np.cumsum(kept, -1) - kept
    kept[(before >= top_p * kept.sum(-1, keepdims=True)) & (top_p > 0) & (top_p < 1) | (kept < min_p)] = 0
    np.put_along_axis(x, order, kept, 1)
    gathered = np.cumsum(x, -1)
    out[rows] = np.argmax(gathered > u[rows] * gathered[:, -1:], -1)
    return out


def apply_logits(p: Any, logits: Array, mask: Any = None, edit_ids: Any = None, **edits: Array) -> Array:
    out = np.pad(logits, ((0, 0), (0, 1)))  # id V falls into a column that is cut off
    if p.edits:
        old, scale = np.take_along_axis(out, edit_ids, 1), np.where(edits["edit_scale"] == 0, 1, edits["edit_scale"])
        new = np.where(old > 0, old / scale, old * scale) + edits["edit_bias"]
        np.put_along_axis(out, edit_ids, new, 1)
    if p.mask:
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little", count=p.vocab)
        out[:, :-1][bits == 0] = -np.inf
    return out[:, :-1]


def logprobs(p: Any, logits: Array, ids: Array, k: int) -> tuple[Array, Array, Array]:
    peak = logits.max(-1, keepdims=True)
    shifted = logits - np.where(peak == -np.inf, np.float32(0), peak)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    top = np.argsort(-logits, -1, kind="stable")[:, :k].astype(np.int32)
    chosen = np.take_along_axis(logs, np.maximum(ids, 0)[:, None], 1)[:, 0]
    return chosen, top, np.take_along_axis(logs, top, 1)
