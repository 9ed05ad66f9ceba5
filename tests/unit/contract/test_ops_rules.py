"""Each rule of the ops has a smoke case that fails where the rule alone is broken: references with one rule changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, WEIGHT_SCHEMES, quantize_groups, quantize_rows
from lineshaft_contract.ops.run import compare, run_reference
from lineshaft_contract.ops.spec import EXACT, Case, Numerics, StepArg

OPS = all_ops()
Reference = Callable[..., Any]
Break = Callable[[Reference], Reference]


def problem(**changes: Callable[[Any], Any]) -> Break:
    """Run under a problem with changed fields."""
    return lambda ref: lambda p, *a, **k: ref(replace(p, **{n: f(p) for n, f in changes.items()}), *a, **k)


def arg(index: int, change: Callable[..., Any]) -> Break:
    """Change one argument: change(problem, argument)."""
    return lambda ref: lambda p, *a, **k: ref(p, *(change(p, x) if i == index else x for i, x in enumerate(a)), **k)


def keyword(name: str, change: Callable[[Any, Any], Any]) -> Break:
    """Change an optional array where it is passed."""
    return lambda ref: lambda p, *a, **k: ref(p, *a, **{n: change(p, x) if n == name else x for n, x in k.items()})


def result(change: Callable[[Any, Any], Any]) -> Break:
    """Change what comes out: change(problem, result)."""
    return lambda ref: lambda p, *a, **k: change(p, ref(p, *a, **k))


def step(index: int, change: Callable[[dict[str, Any], str], Mapping[str, Any]]) -> Break:
    """Change arrays of the step: change(arrays, the problem's group)."""

    def changed(p: Any, given: StepArg) -> StepArg:
        return StepArg({**given.arrays, **change(dict(given.arrays), str(p.group))}, given.shape)

    return arg(index, changed)


def narrow_ids(name: str, dtype: Any) -> Callable[[dict[str, Any], str], Mapping[str, Any]]:
    return lambda arrays, g: {f"{name}.{g}": arrays[f"{name}.{g}"].astype(dtype).astype(np.int32)}


def from_positions(arrays: dict[str, Any], g: str) -> Mapping[str, Any]:
    """Contexts that end at the last query's position."""
    lengths, bounds = arrays[f"context_lens.{g}"].copy(), arrays["query_starts"]
    some = np.diff(bounds) > 0
    lengths[some] = arrays["positions"][bounds[1:][some] - 1] % 64 + 1
    return {f"context_lens.{g}": lengths}


def other_flavour(pages: Mapping[str, Any]) -> dict[str, Any]:
    """fp8 codes taken for those of the other flavour."""

    def swapped(name: str) -> str:
        return name.removesuffix("fnuz") if name == "float8_e5m2fnuz" else {
            "float8_e4m3fnuz": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fnuz", "float8_e5m2": "float8_e5m2fnuz",
        }.get(name, "")  # fmt: skip

    names = {name: swapped(array.dtype.name) for name, array in pages.items()}
    return {n: a.view(getattr(ml_dtypes, names[n])) if names[n] else a for n, a in pages.items()}


def mean_of_values(ref: Reference) -> Reference:
    """A query without a visible key gets something else than 0."""
    return result(lambda p, out: np.where(out == 0, 0.1, out) if not p.return_lse else out)(ref)


def leaking(ref: Reference) -> Reference:
    """Masked values still take part, with weight 0."""

    def run(p: Any, q: Any, cache: Any, step: Any, **k: Any) -> Any:
        out = ref(p, q, cache, step, **k)
        if p.return_lse or p.value_in_key:
            return out
        tail = cache["v"][step.arrays[f"page_table.{p.group}"].max(1)].astype(float)
        return out + (0 * tail).sum()

    return run


def heads_interleaved(p: Any, q: Any) -> Any:
    order = np.arange(p.q_heads).reshape(p.q_heads // p.kv_heads, p.kv_heads).T.reshape(-1)
    return q[:, order]


def unturned(ref: Reference) -> Reference:
    """The queries are turned and the keys are not."""
    at_0 = arg(4, lambda p, at: at * 0)(ref)
    return lambda p, *a, **k: (ref(p, *a, **k)[0], at_0(p, *a, **k)[1])


def unturned_queries(ref: Reference) -> Reference:
    """The keys are turned and the queries are not."""
    at_0 = arg(4, lambda p, at: at * 0)(ref)
    return lambda p, *a, **k: (at_0(p, *a, **k)[0], ref(p, *a, **k)[1])


def in_order_of_slots(p: Any, given: StepArg) -> StepArg:
    return StepArg({**given.arrays, f"slots.{p.group}": np.sort(given.arrays[f"slots.{p.group}"])}, given.shape)


def turned_by_slots(ref: Reference) -> Reference:
    return lambda p, *a, **k: ref(p, *a[:4], a[5].arrays[f"slots.{p.group}"], a[5], **k)


ATTEND: dict[str, Break] = {
    "window one longer": problem(window=lambda p: p.window and p.window + 1),
    "window one shorter": problem(window=lambda p: p.window - 1 if p.window > 1 else p.window),
    "window ignored": problem(window=lambda p: 0),
    "not causal": problem(causal=lambda p: False),
    "always causal": problem(causal=lambda p: True),
    "scale after the soft cap": problem(softcap=lambda p: p.softcap * p.scale),
    "soft cap ignored": problem(softcap=lambda p: 0.0),
    "sinks counted twice": keyword("sinks", lambda p, s: s + math.log(2)),
    "sinks scaled": keyword("sinks", lambda p, s: s * p.scale),
    "sinks capped": keyword("sinks", lambda p, s: p.softcap * np.tanh(s / p.softcap) if p.softcap else s),
    "sinks ignored": keyword("sinks", lambda p, s: np.full_like(s, -np.inf)),
    "causality from positions": step(2, from_positions),
    "page ids in 16 bits": step(2, narrow_ids("page_table", np.uint16)),
    "page 0 read as live": step(2, lambda a, g: {f"page_table.{g}": np.maximum(a[f"page_table.{g}"], 1)}),
    "the last table column ignored": step(
        2, lambda a, g: {f"page_table.{g}": a[f"page_table.{g}"] * (np.arange(a[f"page_table.{g}"].shape[1]) < 2)}
    ),
    "group 0 for every group": problem(group=lambda p: 0),
    "page_starts ignored": problem(page_starts=lambda p: False),
    "key_ranges with their stop": keyword("key_ranges", lambda p, r: r + np.array([0, 1], np.int32)),
    "key_ranges ignored": keyword("key_ranges", lambda p, r: r * 0 + np.array([0, 10**6], np.int32)),
    "ancestors ignored": keyword("ancestors", lambda p, a: np.full_like(a, 2**32 - 1)),
    "ancestors: one word": keyword("ancestors", lambda p, a: np.repeat(a[:, :1], a.shape[1], 1)),
    "heads of a group interleaved": arg(0, heads_interleaved),
    "fp8 of the other flavour": arg(1, lambda p, pages: other_flavour(pages)),
    "scales of keys and values swapped": keyword("kv_scales", lambda p, s: s[::-1]),
    "scale of the first head for all": keyword(
        "kv_scales", lambda p, s: s[:, :1].repeat(s.shape[1], 1) if s.ndim > 1 else s
    ),
    "lse in base 2": result(lambda p, out: (out[0], out[1] / math.log(2)) if p.return_lse else out),
    "lse rounded": result(
        lambda p, out: (out[0], out[1].astype(ml_dtypes.bfloat16).astype(np.float32)) if p.return_lse else out
    ),
    "mean(V) where nothing is visible": mean_of_values,
    "V not masked": leaking,
}  # fmt: skip


def saturates_not(p: Any, pages: Any) -> Any:
    """Codes that would saturate are NaN."""
    top = {name: np.nanmax(np.abs(array.astype(float))) for name, array in pages.items()}
    return {
        n: np.where(np.abs(a.astype(float)) == top[n], np.nan, a.astype(float)).astype(a.dtype)
        for n, a in pages.items()
    }


WRITE: dict[str, Break] = {
    "slots in 16 bits": step(3, narrow_ids("slots", np.uint16)),
    "slots from positions": step(3, lambda a, g: {f"slots.{g}": a["positions"] % 64}),
    "group 0 for every group": problem(group=lambda p: 0),
    "one page late": step(3, lambda a, g: {f"slots.{g}": np.where(a[f"slots.{g}"] > 0, a[f"slots.{g}"] - 1, 0)}),
    "scales of keys and values swapped": keyword("kv_scales", lambda p, s: s[::-1]),
    "overflow is NaN": lambda ref: lambda p, *a, **k: (
        saturates_not(p, ref(p, *a, **k)) if p.kv_dtype.startswith("float8") else ref(p, *a, **k)
    ),
    "-0 stored as 0x80": result(lambda p, pages: {n: negative_zero(a) for n, a in pages.items()}),
}  # fmt: skip


def negative_zero(pages: Any) -> Any:
    raw = pages.view(np.uint8).copy() if pages.dtype.itemsize == 1 and pages.dtype != np.int8 else None
    return pages if raw is None else np.where(raw == 0, 0x80, raw).astype(np.uint8).view(pages.dtype)


def rope_angles_in_bfloat16(ref: Reference) -> Reference:
    return lambda p, q, k, at, **kw: ref(p, q, k, at.astype(ml_dtypes.bfloat16).astype(np.int32), **kw)


def sequential(ref: Reference) -> Reference:
    """Copies one after another."""

    def run(p: Any, cache: Any, src: Any, dst: Any, *, num: Any) -> Any:
        for i in range(len(src)):
            cache = ref(p, cache, src[i : i + 1], dst[i : i + 1], num=num)
        return cache

    return run


def sorted_cdf(ref: Reference) -> Reference:
    """The inverse CDF over descending probabilities."""

    def run(p: Any, logits: Any, params: Any, u: Any, *, num: Any) -> Any:
        order = np.argsort(-logits.astype(float), axis=-1, kind="stable")
        found = ref(p, np.take_along_axis(logits, order, -1), params, u, num=num)
        return np.where(found < 0, -1, np.take_along_axis(order, np.maximum(found, 0)[:, None], -1)[:, 0]).astype(
            np.int32
        )

    return run


def top_p_first(ref: Reference) -> Reference:
    def run(p: Any, logits: Any, params: Any, u: Any, *, num: Any) -> Any:
        both = (params["top_k"] > 0) & (params["top_p"] > 0)
        return ref(p, logits, {**params, "top_p": np.where(both, 0, params["top_p"]).astype(np.float32)}, u, num=num)

    return run


def reversed_ties(ref: Reference) -> Reference:
    """Of equal values the last wins."""

    def run(p: Any, x: Any, *args: Any, num: Any) -> Any:
        out = ref(p, x[:, ::-1], *args, num=num)
        ids, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        ids = np.where(ids < 0, ids, x.shape[1] - 1 - ids).astype(np.int32)
        return ids if rest is None else (ids, *rest)

    return run


def high_bit_first(p: Any, mask: Any) -> Any:
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little").reshape(*mask.shape, 32)
    return np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(np.uint32).reshape(mask.shape)


def edits_over_mask(ref: Reference) -> Reference:
    """An edited token comes back where the mask has taken it."""

    def run(p: Any, logits: Any, *, num: Any, mask: Any = None, **edits: Any) -> Any:
        out, bare = ref(p, logits, num=num, mask=mask), ref(p, logits, num=num, **edits)
        return np.where(bare == ref(p, logits, num=num), out, bare)

    return run


def always_divided(ref: Reference) -> Reference:
    """A scale divides negative logits too: where they are multiplied, it is turned over."""

    def run(p: Any, logits: Any, *, edit_ids: Any = None, edit_scale: Any = None, **k: Any) -> Any:
        if edit_ids is None:
            return ref(p, logits, **k)
        old = np.take_along_axis(logits, np.minimum(edit_ids, p.vocab - 1), 1)
        with np.errstate(all="ignore"):
            scale = np.where((old > 0) | (edit_scale == 0), edit_scale, 1 / edit_scale)
        return ref(p, logits, edit_ids=edit_ids, edit_scale=scale, **k)

    return run


def bias_first(ref: Reference) -> Reference:
    def run(p: Any, logits: Any, *, edit_scale: Any = None, edit_bias: Any = None, **k: Any) -> Any:
        if edit_scale is None:
            return ref(p, logits, **k)
        moved = ref(p, logits, **{**k, "num": EXACT}, edit_scale=edit_scale * 0, edit_bias=edit_bias)
        return ref(p, moved, **k, edit_scale=edit_scale, edit_bias=edit_bias * 0)

    return run


def no_wrap(p: Any, out: Any) -> Any:
    return np.where(np.isneginf(out), 0.0, out).astype(out.dtype)


def quantized(change: Callable[[Any, Any, Any], Any]) -> Break:
    """Quantized weights are change(problem, codes, scales), in float64."""

    def broken(ref: Reference) -> Reference:
        def run(p: Any, x: Any, w: Any, **k: Any) -> Any:
            if p.scheme not in WEIGHT_SCHEMES:
                return ref(p, x, w, **k)
            codes, scales = quantize_rows(w, p.scheme)
            return ref(replace(p, scheme="none"), x, change(p, codes.astype(float), scales.astype(float)), **k)

        return run

    return broken


def requantized(to_codes: Callable[[Any], Any] = np.rint, zero: float = 1.0) -> Break:
    """int8 codes are `to_codes(w / scale)`; the scale of a row of zeros is `zero`."""

    def broken(ref: Reference) -> Reference:
        def run(p: Any, x: Any, w: Any, **k: Any) -> Any:
            if p.scheme != "int8":
                return ref(p, x, w, **k)
            scale = np.abs(w.astype(float)).max(1, keepdims=True) / 127
            scale[scale == 0] = zero
            return ref(replace(p, scheme="none"), x, to_codes(w.astype(float) / scale) * scale, **k)

        return run

    return broken


def activated(change: Callable[[Any], Any]) -> Break:
    """Where activations are quantized, change(x) in their place, and the weight's codes with their scales."""

    def broken(ref: Reference) -> Reference:
        def run(p: Any, x: Any, w: Any, **k: Any) -> Any:
            if p.scheme not in ACTIVATION_SCHEMES:
                return ref(p, x, w, **k)
            return ref(replace(p, scheme=ACTIVATION_SCHEMES[p.scheme]), change(x), w, **k)

        return run

    return broken


def one_step(x: Any, axis: int | None, halves: Callable[[Any], Any] = np.rint) -> Any:
    """x in steps of its largest magnitude along an axis over 127."""
    step = np.abs(x.astype(float)).max(axis, keepdims=True) / 127
    return halves(x / np.where(step == 0, 1, step)) * step


def grouped(change: Callable[[Any, Any], Any]) -> Break:
    """Weights in groups are change(codes [n, groups, size], scales [n, groups, 1]), in float64."""

    def broken(ref: Reference) -> Reference:
        def run(p: Any, x: Any, w: Any, **k: Any) -> Any:
            if p.scheme != "int4":
                return ref(p, x, w, **k)
            codes, scales = quantize_groups(w, p.group_size)
            whole = change(codes.reshape(*scales.shape, -1).astype(float), scales[..., None].astype(float))
            return ref(replace(p, scheme="none", group_size=0), x, whole.reshape(w.shape), **k)

        return run

    return broken


def in_steps_of_sevenths(ref: Reference) -> Reference:
    """Codes of groups are symmetric, from -7 to 7."""

    def run(p: Any, x: Any, w: Any, **k: Any) -> Any:
        if p.scheme != "int4":
            return ref(p, x, w, **k)
        groups = w.astype(float).reshape(len(w), -1, p.group_size)
        step = np.abs(groups).max(2, keepdims=True) / 7
        whole = np.rint(groups / np.where(step == 0, 1, step)) * step
        return ref(replace(p, scheme="none", group_size=0), x, whole.reshape(w.shape), **k)

    return run


OTHERS: dict[str, dict[str, Break]] = {
    "embed": {
        "vocab_start ignored": arg(2, lambda p, start: start * 0),
        "clamped outside the shard": lambda ref: lambda p, ids, table, start, num: ref(
            p, np.clip(ids, start[0], start[0] + len(table) - 1), table, start, num=num
        ),
        "multiplied by 0 outside": result(lambda p, out: out + 0 * np.nan if not out.any() else out),
    },
    "linear": {
        "no bias": keyword("bias", lambda p, b: b * 0), "transposed": arg(1, lambda p, w: w[::-1]),
        "not quantized": problem(scheme=lambda p: "none"),
        "activations as they are": activated(lambda x: x),
        "one scale for all tokens": activated(lambda x: one_step(x, None)),
        "a scale for each column of activations": activated(lambda x: one_step(x, 0)),
        "codes of activations round halves away": activated(
            lambda x: one_step(x, 1, lambda y: np.trunc(y + np.copysign(0.5, y)))
        ),
        "codes of activations cut off": activated(lambda x: one_step(x, 1, np.trunc)),
        "w8a8 in the other codes": problem(
            scheme=lambda p: {"w8a8_fp8": "w8a8_int8", "w8a8_int8": "w8a8_fp8"}.get(p.scheme, p.scheme)
        ),
        "a NaN token hidden": activated(lambda x: one_step(np.nan_to_num(x), 1)),
        "int4 not scaled": grouped(lambda codes, scales: codes),
        "int4: one scale a row": grouped(lambda codes, scales: codes * scales[:, :1]),
        "int4: the next group's scale": grouped(lambda codes, scales: codes * np.roll(scales, 1, 1)),
        "int4: scales without their sign": grouped(lambda codes, scales: codes * np.abs(scales)),
        "int4: halves of a byte swapped": grouped(
            lambda codes, scales: codes.reshape(*codes.shape[:2], -1, 2)[..., ::-1].reshape(codes.shape) * scales
        ),
        "int4: codes without an offset": grouped(lambda codes, scales: (codes + 8) * scales),
        "int4: codes of two's complement": grouped(lambda codes, scales: (codes + 8 - 16 * (codes >= 0)) * scales),
        "int4: NaN hidden": grouped(lambda codes, scales: codes * np.nan_to_num(scales)),
        "int4 from -7 to 7": in_steps_of_sevenths,
        "int8 for fp8": problem(scheme=lambda p: "int8" if p.scheme == "fp8" else p.scheme),
        "scales ignored": quantized(lambda p, q, s: q),
        "scale of the first row": quantized(lambda p, q, s: q * s[:1, None]),
        "scale of the next row": quantized(lambda p, q, s: q * np.roll(s, 1)[:, None]),
        "one scale for all rows": quantized(lambda p, q, s: np.rint(q * s[:, None] / (c := np.nanmax(s))) * c),
        "codes truncated": requantized(np.trunc), "a row of zeros is NaN": requantized(zero=np.nan),
        "a row with a NaN is hidden": quantized(lambda p, q, s: q * np.nan_to_num(s)[:, None]),
    },
    "head_linear": {"the first head's matrix for all": arg(1, lambda p, w: np.repeat(w[:1], len(w), 0))},
    "rms_norm": {
        "another eps": problem(eps=lambda p: 1e-5), "no eps": problem(eps=lambda p: 0.0),
        "1 + w": arg(1, lambda p, w: (w + 1).astype(w.dtype)),
    },
    "add_rms_norm": {"the sum is not returned": result(lambda p, out: (out[0], out[0]))},
    "silu_mul": {"the gate last": arg(0, lambda p, x: np.roll(x, p.width, -1))},
    "gelu_mul": {"the gate last": arg(0, lambda p, x: np.roll(x, p.width, -1))},
    "rope": {
        "interleaved ignored": problem(interleaved=lambda p: False),
        "always interleaved": problem(interleaved=lambda p: True),
        "another base": problem(base=lambda p: 10000.0),
        "scaling ignored": problem(scaling=lambda p: type(p.scaling)()),
        "the whole head turned": problem(dim=lambda p: p.head_dim if not p.scaling.freq_factors else p.dim),
        "angles in bfloat16": rope_angles_in_bfloat16,
        "positions count up": arg(2, lambda p, at: np.arange(at[0], at[0] + len(at), dtype=np.int32)),
    },
    "rope_write_kv": {
        "k written as it came": unturned, "q as it came": unturned_queries,
        "v turned too": arg(3, lambda p, v: None if v is None else v + 2**-8),
        "in the order of the slots": arg(5, in_order_of_slots), "turned by their slots": turned_by_slots,
        "group 0 for every group": problem(group=lambda p: 0),
        "interleaved ignored": problem(interleaved=lambda p: False),
        "not grown": problem(attention_factor=lambda p: 1.0),
        "the whole head turned": problem(dim=lambda p: p.head_dim),
        "padding to page 1": step(5, lambda a, g: {f"slots.{g}": np.maximum(a[f"slots.{g}"], 16)}),
        "fp8 of the other flavour": result(lambda p, out: (out[0], other_flavour(out[1]))),
        "keys in bfloat16": result(lambda p, out: (out[0], {
            n: a.astype(ml_dtypes.bfloat16).astype(a.dtype) if n == "k" else a for n, a in out[1].items()
        })),
        "heads one late": arg(2, lambda p, k: np.roll(k, 1, 1)),
    },
    "merge_states": {
        "sinks once per part": keyword("sinks", lambda p, s: s + math.log(p.parts)),
        "empty parts read": lambda ref: lambda p, out, lse, **k: ref(p, out, np.maximum(lse, -5.0), **k),
    },
    "router_topk": {
        "ties to the highest": reversed_ties,
        "softmax after": problem(softmax=lambda p: "after"), "softmax before": problem(softmax=lambda p: "before"),
        "not renormalised": problem(renormalise=lambda p: False), "not scaled": problem(scale=lambda p: 1.0),
        "groups ignored": problem(groups=lambda p: 0),
        "not ordered": result(lambda p, out: (out[0][:, ::-1], out[1][:, ::-1])),
        "weights rounded": result(lambda p, out: (out[0], out[1].astype(ml_dtypes.bfloat16).astype(np.float32))),
    },
    "expert_mlp": {
        "expert_map is the identity": arg(5, lambda p, m: np.arange(len(m), dtype=np.int32) % p.local),
        "-1 taken for 0": arg(5, lambda p, m: np.maximum(m, 0)),
        "the gate last": arg(3, lambda p, w: np.roll(w, p.width, 1)),
        "silu for every activation": problem(activation=lambda p: "silu"),
        "four rows an expert": lambda ref: lambda p, x, ids, probs, *a, **k: ref(
            p, x, ids, probs * (np.arange(len(x)) < 4)[:, None], *a, **k
        ),
        "biases of the first expert": keyword("w13_bias", lambda p, b: b[:1].repeat(len(b), 0)),
        "no last bias": keyword("w2_bias", lambda p, b: b * 0),
        "no limit": problem(swiglu_limit=lambda p: p.swiglu_limit and 1e9),
        "alpha is 1": problem(swiglu_alpha=lambda p: p.swiglu_alpha and 1.0),
    },
    "moe_dispatch": {"-1 taken for 0": arg(2, lambda p, m: np.maximum(m, 0))},
    "grouped_mlp": {"rows beyond are read": result(lambda p, out: np.where(out == 0, np.nan, out))},
    "moe_combine": {"source ignored": arg(1, lambda p, s: np.arange(len(s), dtype=np.int32))},
    "gather_rows": {"rows in order": arg(1, lambda p, rows: np.sort(rows))},
    "merge_rows": {"-1 taken for 0": arg(2, lambda p, s: np.maximum(s, 0))},
    "apply_logits": {
        "the high bit first": keyword("mask", high_bit_first), "edits over the mask": edits_over_mask,
        "masked logits are 0": result(no_wrap), "no bias": keyword("edit_bias", lambda p, b: b * 0),
        "no scale": keyword("edit_scale", lambda p, s: s * 0),
        "a scale of 0": keyword("edit_scale", lambda p, s: np.maximum(s, 1e-6)),
        "padding wraps": keyword("edit_ids", lambda p, ids: np.minimum(ids, p.vocab - 1)),
        "bias before scale": bias_first, "always divided": always_divided,
    },
    "sample": {
        "sorted order": sorted_cdf, "top_p before top_k": top_p_first,
        "the last of ties": reversed_ties,
        "0 for an empty row": result(lambda p, ids: np.maximum(ids, 0)),
        "one u for all": arg(2, lambda p, u: np.repeat(u[:1], len(u), 0)),
        "u above 0": arg(2, lambda p, u: np.maximum(u, 0.2).astype(u.dtype)),
        "no temperature": arg(1, lambda p, s: {**s, "temperature": np.minimum(s["temperature"], 1)}),
        "min_p ignored": arg(1, lambda p, s: {**s, "min_p": s["min_p"] * 0}),
        "top_k ignored": arg(1, lambda p, s: {**s, "top_k": s["top_k"] * 0}),
        "top_p ignored": arg(1, lambda p, s: {**s, "top_p": s["top_p"] * 0}),
        "typical_p ignored": arg(1, lambda p, s: {**s, "typical_p": s.get("typical_p", s["top_p"]) * 0}),
        "typical_p taken for top_p": arg(1, lambda p, s: {
            **s, "top_p": s.get("typical_p", s["top_p"]), "typical_p": s["top_p"] * 0,
        }),
    },
    "argmax": {"the last of ties": reversed_ties, "0 for an empty row": result(lambda p, ids: np.maximum(ids, 0))},
    "logprobs": {
        "base 2": result(lambda p, out: (out[0] / math.log(2), *out[1:])),
        "an id of -1 from the end": result(lambda p, out: (np.roll(out[0], 1), *out[1:])),
    },
    "copy_pages": {"one after another": sequential}, "copy_slots": {"one after another": sequential},
    "read_pages": {"ids in order": arg(1, lambda p, ids: np.sort(ids))},
    "write_pages": {"one page late": arg(1, lambda p, ids: np.maximum(ids - 1, 0))},
    "all_gather": {"reversed": arg(0, lambda p, xs: xs[::-1])},
    "all_to_all": {"reversed": arg(0, lambda p, xs: xs[::-1])},
    "reduce_scatter": {"tiles reversed": result(lambda p, out: out[::-1])},
    "broadcast": {"of member 0": lambda ref: lambda p, xs, axis, src, num: ref(p, xs, axis, 0, num=num)},
    "permute": {"the other way": lambda ref: lambda p, xs, axis, shift, num: ref(p, xs, axis, -shift, num=num)},
    "all_reduce": {"a member left out": arg(0, lambda p, xs: [*xs[:-1], xs[-1] * 0])},
}  # fmt: skip
BROKEN = [
    (op, rule, broken)
    for op, table in {"attend": ATTEND, "write_kv": WRITE, **OTHERS}.items()
    for rule, broken in table.items()
]


def sees(op: str, case: Case, broken: Break) -> bool:
    """Whether the case tells the broken reference from the right one; one that raises is seen too."""
    spec = OPS[op]
    num = Numerics.of(case.problem.dtype, spec.accumulate)
    try:
        with np.errstate(all="ignore"):
            wrong = run_reference(replace(spec, reference=broken(spec.reference)), case, num)
    except IndexError:
        return True
    return bool(compare(spec, case, wrong))


@cache
def cases_of(op: str) -> list[Case]:
    return [c for c in OPS[op].cases(np.random.default_rng(0), "smoke") if c.problem.dtype == "float32"]


@pytest.mark.parametrize(("op", "rule", "broken"), BROKEN, ids=[f"{op}: {rule}" for op, rule, _ in BROKEN])
def test_a_broken_rule_is_seen_by_a_smoke_case(op: str, rule: str, broken: Break) -> None:
    assert any(sees(op, case, broken) for case in cases_of(op)), f"{op} without a case for: {rule}"


def test_every_op_but_the_plainest_has_a_broken_rule() -> None:
    assert set(OPS) - {op for op, _, _ in BROKEN} == {"concat", "add", "latent_attend"}
