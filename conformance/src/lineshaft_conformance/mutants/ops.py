"""Mutants of every op but attention and collectives, and kernels that break what holds for all ops."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lineshaft_conformance.mutants.mutant import (
    Make,
    Mutant,
    mutant,
    plain,
    with_added,
    with_call,
    with_kernel,
    with_kernels,
    with_problem,
    with_result,
)
from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops.logits import kept_tokens
from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, INT4
from lineshaft_contract.problems import RopeScaling
from lineshaft_contract.schemes import dequantize
from lineshaft_torch.bound import DENSE, dense, recipe, stateless
from lineshaft_torch.bound import with_problem as given_problem
from lineshaft_torch.kernels import portable_kernels
from lineshaft_torch.kernels.linear import linear, quantized_linear, quantized_rows
from lineshaft_torch.pages import SLOTS_LAYOUT, movable, page_view

Tensor = torch.Tensor


def before(op: str, change: Callable[..., tuple[Any, ...]]) -> Make:
    """Makes a mutant whose kernels of `op` get `change(*args)` as arguments."""
    return with_call(op, lambda problem, run, *args, **kwargs: run(*change(*args), **kwargs))


def after(op: str, change: Callable[[Any], Any]) -> Make:
    """Makes a mutant whose kernels of `op` return `change(result)`."""
    return with_result(op, lambda problem, result: change(result))


# ---- the cache -------------------------------------------------------------------------------------------------


def write(store: Callable[..., None]) -> Make:
    """Makes a mutant whose write_kv is `store(flat, slots, new)` for keys and for values."""

    def call(p: Any, run: Any, cache: Any, k: Tensor, v: Any, step: Any, **kw: Any) -> Any:
        for name, new in (("k", k), ("v", v)):
            if new is not None:
                store(cache.arrays[name], step.groups[p.group].slots.long(), new)
        return cache

    return with_call("write_kv", call)


def plain_store(flat: Tensor, slots: Tensor, new: Tensor) -> None:
    top = torch.finfo(flat.dtype).max
    movable(flat).index_copy_(0, slots, movable(new.clamp(-top, top).to(flat.dtype)))


def store_one_too_many(flat: Tensor, slots: Tensor, new: Tensor) -> None:
    plain_store(flat, (slots + 1).clamp(max=len(flat) - 1), new)
    plain_store(flat, slots, new)


def store_toward_zero(flat: Tensor, slots: Tensor, new: Tensor) -> None:
    rounded = new.to(flat.dtype).to(new.dtype)
    smaller = torch.where(rounded.abs() > new.abs(), new * (1 - torch.finfo(flat.dtype).eps / 2), new)
    plain_store(flat, slots, smaller)


def store_unsaturated(flat: Tensor, slots: Tensor, new: Tensor) -> None:
    top = torch.finfo(flat.dtype).max
    codes = torch.where(new.abs() > top, torch.nan, new).to(flat.dtype)
    movable(flat).index_copy_(0, slots, movable(codes))


def one_by_one(kind: str) -> Make:
    """Makes a mutant whose copy reads what it has just written."""

    def call(p: Any, run: Any, cache: Any, src: Tensor, dst: Tensor) -> Any:
        arrays = page_view(cache) if kind == "copy_pages" else cache.arrays
        for array in arrays.values():
            for a, b in zip(src.tolist(), dst.tolist(), strict=True):
                array[b] = array[a]
        return cache

    return with_call(kind, call)


CACHE = (
    mutant("one-slot-too-many", "write_kv writes a token's slot and no other (step)", "write_kv/*",
           write(store_one_too_many)),
    mutant("in-order", "slots give each token's place, in any order (step)", "write_kv/*",
           write(lambda flat, slots, new: plain_store(flat, slots.sort().values, new))),
    mutant("group-0", "the cache's group comes from its problem (ops)", "write_kv/*group1*",
           with_problem("write_kv", lambda p: {"group": 0})),
    mutant("skips-slot-0-of-page", "slots = page * page_size + offset, from offset 0 (step)", "write_kv/prefill/*",
           write(lambda flat, slots, new: plain_store(flat, slots * (slots % 20 > 0), new))),
    mutant("forgets-v", "write_kv stores keys and values (ops)", "write_kv/mixed/page16*",
           with_call("write_kv", lambda p, run, cache, k, v, step: run(
               cache, k, None if v is None else v * 0, step))),
    mutant("slots-16-bits", "ids are int32 (step)", "write_kv/high_ids/*",
           write(lambda flat, slots, new: plain_store(flat, slots % 65536, new))),
    mutant("overflow-is-nan", "a value beyond fp8's range saturates", "write_kv/fp8_saturates/*",
           write(store_unsaturated)),
    mutant("rounds-toward-zero", "values are rounded to even", "write_kv/fp8_saturates/*",
           write(store_toward_zero)),
    mutant("keeps-first-tokens", "write_kv writes every token of a step (ops)", "write_kv/prefill/*",
           write(lambda flat, slots, new: plain_store(flat, slots[:16], new[:16]))),
    mutant("reversed", "page i of the result is page ids[i] (ops)", "read_pages/*",
           before("read_pages", lambda cache, ids: (cache, ids.flip(0)))),
    mutant("clears-others", "write_pages leaves all other pages (ops)", "write_pages/*",
           with_call("write_pages", lambda p, run, cache, ids, pages: run(clear(cache), ids, pages))),
    mutant("overlap", "all reads of copy_pages come before all writes (ops)", "copy_pages/swap*",
           one_by_one("copy_pages")),
    mutant("overlap", "all reads of copy_slots come before all writes (ops)", "copy_slots/swap*",
           one_by_one("copy_slots")),
    mutant("keys-only", "every array of the cache is copied (ops)", "copy_pages/*",
           with_call("copy_pages", lambda p, run, cache, src, dst: (run(
               replace(cache, arrays={"k": cache.arrays["k"]}), src, dst), cache)[1])),
)  # fmt: skip


def clear(cache: Any) -> Any:
    for array in cache.arrays.values():
        array.zero_()
    return cache


# ---- rows, products, norms -------------------------------------------------------------------------------------


def gelu_erf(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return (torch.nn.functional.gelu(gate) * up).to(x.dtype)


def silu_overflow(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    return (gate * gate.exp() / (1 + gate.exp()) * up).to(x.dtype)


def blank_if(wrong: bool, out: Tensor) -> Tensor:
    return out * 0 if wrong else out


def drop_odd_column(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    even = torch.arange(x.shape[-1]) < x.shape[-1] // 2 * 2
    return x * even, *rest


def as_tf32(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    kept = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x
    return kept, *rest


def bf16_product(p: Any, run: Any, x: Tensor, w: Any, **kw: Any) -> Tensor:
    """A product whose partial sums are held in bfloat16, for problems of bfloat16 with a dense weight."""
    right: Tensor = run(x, w, **kw)
    if p.dtype != "bfloat16" or kw:
        return right
    total, matrix = torch.zeros_like(right), next(iter(w.arrays.values())).to_dense()
    for i in range(p.k):
        total = total + x[:, i : i + 1] * matrix[:, i]
    return total


def with_codes(change: Callable[..., dict[str, Tensor]], scheme: str = "") -> Make:
    """Makes a mutant whose products read `change(q, scale)` in the place of these leaves of a quantized weight."""

    def call(p: Any, run: Any, x: Tensor, w: Any, **kw: Any) -> Any:
        if p.scheme in ((scheme,) if scheme else ("int8", "fp8")):
            w = replace(w, arrays={**w.arrays, **change(**w.arrays)})
        return run(x, w, **kw)

    return with_call("linear", call)


def truncated(kernel: Kernel) -> Kernel:
    """A kernel whose int8 codes are rounded towards zero."""
    pack = kernel.pack
    if pack is None or kernel.layout != "int8_rows":
        return kernel

    def truncating(param: Any, local: Any) -> dict[str, Any]:
        leaves = pack(param, local)
        wide = np.concatenate([dequantize(part, "float32") for part in local.parts])
        return {**leaves, "q": np.nan_to_num(np.trunc(wide / leaves["scale"][:, None])).astype(np.int8)}

    return replace(kernel, pack=truncating)


def eight_bit_rows(p: Any, run: Any, x: Tensor, w: Any, **kw: Any) -> Any:
    """Activations in int8, row by row, where weights are quantized."""
    step = x.float().abs().amax(1, keepdim=True) / 127
    return run(x if p.scheme == "none" else ((x / step).round() * step).to(x.dtype), w, **kw)


def groups_with(change: Callable[..., dict[str, Tensor]]) -> Make:
    """Makes a mutant whose products read `change(q, scale)` in the place of these leaves of a weight in groups."""

    def call(p: Any, run: Any, x: Tensor, w: Any, **kw: Any) -> Any:
        return run(x, replace(w, arrays={**w.arrays, **change(**w.arrays)}) if p.scheme == INT4 else w, **kw)

    return with_call("linear", call)


def activations(run_with: Callable[..., Any]) -> Make:
    """Makes a mutant whose products of quantized activations are `run_with(p, run, x, w, **kw)`."""

    def call(p: Any, run: Any, x: Tensor, w: Any, **kw: Any) -> Any:
        return run_with(p, run, x, w, **kw) if p.scheme in ACTIVATION_SCHEMES else run(x, w, **kw)

    return with_call("linear", call)


def in_one_step(p: Any, run: Any, x: Tensor, w: Any, **kw: Any) -> Any:
    """Activations in int8 with one scale for all tokens."""
    step = x.float().nan_to_num().abs().max() / 127
    return quantized_linear((x.float() / step).round() * step, w, **kw).to(x.dtype)


UNQUANTIZED = recipe(
    "dense_linear", "linear", stateless(linear), layout=DENSE, handles=frozenset({"bias", "scheme"}), priority=20
)
"""A kernel that takes the weights of every scheme as they are."""


def executed_below(op: str, only: str, below: torch.dtype) -> Make:
    """Makes a mutant whose kernels of `op` round operands of dtype `only` to a narrower one."""

    def narrow(item: Any) -> Any:
        same = isinstance(item, Tensor) and item.dtype == getattr(torch, only)
        return item.to(below).to(item.dtype) if same else item

    return with_call(op, lambda p, run, *args, **kw: run(*map(narrow, args), **kw))


def norm_of(scale: Callable[[Tensor, float], Tensor], center: bool = False, add: float = 0.0) -> Make:
    """Makes a mutant whose rms_norm divides by `scale(mean of squares, eps)`."""

    def call(p: Any, run: Any, x: Tensor, w: Any) -> Any:
        wide = x.double() - (x.double().mean(-1, keepdim=True) if center else 0)
        return (wide / scale(wide.square().mean(-1, keepdim=True), p.eps) * (dense(w).double() + add)).to(x.dtype)

    return with_call("rms_norm", call)


def norm_over_all(p: Any, run: Any, x: Tensor, w: Any) -> Any:
    mean = x.double().square().flatten(1).mean(-1) if x.dim() == 3 else x.double().square().mean(-1)
    shape = (-1, *[1] * (x.dim() - 1))
    return (x.double() / (mean.view(shape) + p.eps).sqrt() * dense(w).double()).to(x.dtype)


ROWS = (
    mutant("vocab-start-ignored", "embed looks up ids - vocab_start (weights, ops)", "embed/middle_shard*",
           before("embed", lambda ids, table, start: (ids, table, start * 0))),
    mutant("clamps-outside", "embed gives 0 outside the shard (ops)", "embed/first_shard*",
           with_call("embed", lambda p, run, ids, table, start: run(
               ids.clamp(int(start), int(start) + p.vocab - 1), table, start))),
    mutant("scale-ignored", "embed multiplies by the scale (ops)", "embed/scaled*",
           with_problem("embed", lambda p: {"scale": 1.0})),
    mutant("ids-of-16-bits", "ids are int32 (step)", "embed/vocabulary*",
           before("embed", lambda ids, table, start: (ids & 0xFFFF, table, start))),
    mutant("last-row-of-shard", "the shard's last row is inside (ops)", "embed/*",
           with_call("embed", lambda p, run, ids, table, start: run(
               torch.where(ids == start + p.vocab - 1, start - 1, ids).int(), table, start))),
    mutant("reversed", "row i of the result is row rows[i] (ops)", "gather_rows/*",
           before("gather_rows", lambda x, rows: (x, rows.flip(0)))),
    mutant("beyond-nine", "problems between those of the cases are right too", "gather_rows/fuzz",
           before("gather_rows", lambda x, rows: (x, torch.cat([rows[:9], rows[9:] * 0])))),
    mutant("minus-one-is-row-0", "merge_rows keeps the row of x where source is -1 (ops)", "merge_rows/*",
           before("merge_rows", lambda x, embeds, source: (x, embeds, source.clamp(min=0)))),
    mutant("order", "concat joins in the order given (ops)", "concat/*",
           before("concat", lambda xs, dim: (xs[::-1], dim))),
    mutant("last-dim", "concat joins along `dim` (ops)", "concat/*", with_call(
        "concat", lambda p, run, xs, dim: torch.cat([x.flatten() for x in xs]).view(run(xs, dim).shape))),
    mutant("subtracts", "add adds (ops)", "add/*", before("add", lambda x, y: (x, -y))),
    mutant("gate-second", "the gate is the first half (ops)", "silu_mul/*",
           before("silu_mul", lambda x: (x.roll(x.shape[-1] // 2, -1),))),
    mutant("overflows", "silu has its limits where exp overflows", "silu_mul/*large*",
           with_call("silu_mul", lambda p, run, x: silu_overflow(x))),
    mutant("erf", "gelu_mul is the tanh approximation", "gelu_mul/*",
           with_call("gelu_mul", lambda p, run, x: gelu_erf(x))),
    mutant("drops-odd-column", "any k and n are products (ops)", "linear/*k67*", before("linear", drop_odd_column)),
    mutant("bias-ignored", "a bias is passed exactly when the problem has one, and is added (ops)", "linear/bias/*",
           with_call("linear", lambda p, run, x, w, **kw: run(x, w, **{k: v * 0 for k, v in kw.items()}))),
    mutant("rows-beyond-512", "a product may have any number of rows (ops)", "linear/prefill/m520*",
           after("linear", lambda out: blank_if(out.shape[0] > 512, out))),
    mutant("columns-beyond-4096", "a product may have any number of columns (ops)", "linear/decode/m2-n4160*",
           after("linear", lambda out: blank_if(out.shape[-1] > 4096, out))),
    mutant("depth-beyond-4096", "a product may have any depth (ops)", "linear/decode/m2-n32-k4352*",
           with_call("linear", lambda p, run, x, *more, **kw: blank_if(p.k > 4096, run(x, *more, **kw)))),
    mutant("last-row-of-tile", "every row of a product is right, also beyond a tile of 16", "linear/prefill/*",
           after("linear", lambda out: torch.cat([out[:16], out[16:] * 0]))),
    mutant("tf32", "f32 products are not run in a narrower dtype (kernels)", "linear/*-f32", before("linear", as_tf32)),
    mutant("bf16-accumulation", "products accumulate in f32 (ops)", "linear/sums/*-bf16",
           with_call("linear", bf16_product)),
    mutant("bf16-under-f32", "a kernel that computes below the problem's dtype declines (kernels)", "linear/*-f32",
           executed_below("linear", "float32", torch.bfloat16)),
    mutant("f32-under-f64", "a kernel that computes below the problem's dtype declines (kernels)", "linear/*-f64",
           executed_below("linear", "float64", torch.float32), size="full"),
    mutant("unquantized", "a quantized weight is rounded as its scheme says (ops)", "linear/*_decode/*-f32",
           with_added(UNQUANTIZED)),
    mutant("truncates-codes", "codes are rounded to the nearest (ops)", "linear/int8_*-f32", with_kernels(truncated)),
    mutant("scale-ignored", "a quantized weight is its codes times the scale of each row (ops)", "linear/*_decode/*",
           with_codes(lambda q, scale: {"scale": scale * 0 + 1})),
    mutant("first-rows-scale", "every row of a quantized weight has a scale of its own (ops)", "linear/*_decode/*",
           with_codes(lambda q, scale: {"scale": scale[:1].expand_as(scale)})),
    mutant("next-rows-scale", "every row of a quantized weight has a scale of its own (ops)", "linear/*_decode/*",
           with_codes(lambda q, scale: {"scale": scale.roll(1)})),
    mutant("narrow-scales", "scales are f32 (ops)", "linear/*_decode/*-f32",
           with_codes(lambda q, scale: {"scale": scale.bfloat16().float()})),
    mutant("codes-unsigned", "int8 codes have a sign (ops)", "linear/int8_*",
           with_codes(lambda q, scale: {"q": q.view(torch.uint8)}, "int8")),
    mutant("codes-fnuz", "fp8 codes are float8_e4m3fn (ops)", "linear/fp8_*",
           with_codes(lambda q, scale: {"q": q.view(torch.float8_e4m3fnuz)}, "fp8")),
    mutant("zero-row-is-nan", "a row of zeros has the scale 1 (ops)", "linear/*_zero_row/*",
           with_codes(lambda q, scale: {"scale": torch.where(q.float().any(1), scale, torch.nan)})),
    mutant("nan-weight-hidden", "NaN and infinite weights show in all results of their row (ops)",
           "linear/*_nan_weight/*", with_codes(lambda q, scale: {"scale": scale.nan_to_num()})),
    mutant("quantizes-x", "the scheme is of the weight: activations are not quantized (ops)", "linear/*_decode/*-f32",
           with_call("linear", eight_bit_rows)),
    mutant("activations-stay", "w8a8: activations are quantized too (ops)", "linear/w8a8_*_decode/*-f32",
           activations(lambda p, run, x, w, **kw: quantized_linear(x, w, **kw))),
    mutant("tokens-share-a-scale", "w8a8: every token has a scale of its own (ops)", "linear/w8a8_*_decode/*-f32",
           activations(in_one_step)),
    mutant("token-scale-ignored", "w8a8: sums are multiplied by the scales of tokens (ops)", "linear/w8a8_*_decode/*",
           activations(lambda p, run, x, w, **kw: run(x / quantized_rows(x, p.scheme)[1].to(x.dtype), w, **kw))),
    mutant("nan-token-hidden", "w8a8: one NaN makes all results of its token NaN (ops)", "linear/w8a8_*_nan_token/*",
           activations(lambda p, run, x, w, **kw: run(x.nan_to_num(), w, **kw))),
    mutant("halves-swapped", "int4: the first of two codes is in the low half of a byte (ops)", "linear/int4_*",
           groups_with(lambda q, scale: {"q": q << 4 | q >> 4})),
    mutant("group-scales-cut", "int4: every group has a scale of its own (ops)", "linear/int4_*",
           groups_with(lambda q, scale: {"scale": scale[:, :1].expand_as(scale)})),
    mutant("group-scales-positive", "int4: scales have a sign (ops)", "linear/int4_*",
           groups_with(lambda q, scale: {"scale": scale.abs()})),
    mutant("group-nan-hidden", "int4: a NaN weight shows in all results of its row (ops)", "linear/int4_nan_weight/*",
           groups_with(lambda q, scale: {"scale": scale.nan_to_num()})),
    mutant("one-head-for-all", "head_linear has a weight per head (ops)", "head_linear/*",
           before("head_linear", lambda x, w: (x, replace(w, arrays={
               key: leaf[:1].expand_as(leaf) for key, leaf in w.arrays.items()})))),
    mutant("eps-missing", "eps is in the problem, and added to the mean (ops)", "rms_norm/zero_row*",
           with_problem("rms_norm", lambda p: {"eps": 0.0})),
    mutant("eps-outside", "eps is added before the square root (ops)", "rms_norm/*-f32",
           norm_of(lambda mean, eps: mean.sqrt() + eps)),
    mutant("eps-fixed", "eps is the problem's (ops)", "rms_norm/*", with_problem("rms_norm", lambda p: {"eps": 1e-6})),
    mutant("subtracts-mean", "an RMS norm does not centre", "rms_norm/*",
           norm_of(lambda mean, eps: (mean + eps).sqrt(), center=True)),
    mutant("one-plus-weight", "the weight is stored as it multiplies", "rms_norm/*",
           norm_of(lambda mean, eps: (mean + eps).sqrt(), add=1.0)),
    mutant("over-heads", "a norm is over the last dim alone (ops)", "rms_norm/heads*",
           with_call("rms_norm", norm_over_all)),
    mutant("returns-r", "add_rms_norm returns x + r (ops)", "add_rms_norm/*",
           with_call("add_rms_norm", lambda p, run, x, r, w: (run(x, r, w)[0], r.clone()))),
    mutant("norms-x", "add_rms_norm norms the sum (ops)", "add_rms_norm/*",
           with_call("add_rms_norm", lambda p, run, x, r, w: (run(x, r * 0, w)[0], x + r))),
)  # fmt: skip


# ---- rope ------------------------------------------------------------------------------------------------------


def fused(call: Callable[..., Any]) -> Make:
    """Makes a backend with one more kernel: rope_write_kv as `call(turn, write, *args)`, where `turn` and `write` are
    the torch kit's kernels of its parts."""
    parts = {kernel.name: kernel for kernel in portable_kernels("cpu")}

    def bind(problem: Any, session: Any) -> Any:
        turn = plain(parts["torch_rope"].bind(problem.rope, session))
        return partial(call, turn, plain(parts["torch_write_kv"].bind(problem.kv, session)))

    handles = frozenset({"interleaved", "attention_factor"})
    return with_added(recipe("fused_rope_write_kv", "rope_write_kv", bind, layout=SLOTS_LAYOUT, handles=handles))


def turned_and_written(
    turn: Any, write: Any, cache: Any, q: Tensor, k: Tensor, v: Any, positions: Tensor, step: Any
) -> Any:
    q, k = turn(q, k, positions)
    return q, write(cache, k, v, step)


def writes_unturned(turn: Any, write: Any, cache: Any, q: Tensor, k: Tensor, v: Any, at: Tensor, step: Any) -> Any:
    return turn(q, k, at)[0], write(cache, k, v, step)


def turns_by_slots(turn: Any, write: Any, cache: Any, q: Tensor, k: Tensor, v: Any, at: Tensor, step: Any) -> Any:
    return turned_and_written(turn, write, cache, q, k, v, step.groups[0].slots.clamp(max=511), step)


def turns_values(turn: Any, write: Any, cache: Any, q: Tensor, k: Tensor, v: Any, at: Tensor, step: Any) -> Any:
    q, turned = turn(q, k, at)
    return q, write(cache, turned, None if v is None else v * (1 + 2**-7), step)


def forgets_queries(turn: Any, write: Any, cache: Any, q: Tensor, k: Tensor, v: Any, at: Tensor, step: Any) -> Any:
    return q.clone(), write(cache, turn(q, k, at)[1], v, step)


ROPE = (
    mutant("writes-unturned", "rope_write_kv writes the keys that it has turned (ops)", "rope_write_kv/mixed/*",
           fused(writes_unturned)),
    mutant("turns-by-slots", "positions turn, slots say where to write (ops)", "rope_write_kv/mixed/*",
           fused(turns_by_slots)),
    mutant("turns-values", "rope_write_kv writes values as they are (ops)", "rope_write_kv/mixed/*",
           fused(turns_values)),
    mutant("forgets-queries", "rope_write_kv returns the queries turned (ops)", "rope_write_kv/mixed/*",
           fused(forgets_queries)),
    mutant("pairs-swapped", "interleaved chooses the pairs (ops)", "rope/*",
           with_problem("rope", lambda p: {"interleaved": not p.interleaved})),
    mutant("base-ignored", "the base is the problem's (ops)", "rope/neox-d64-long*",
           with_problem("rope", lambda p: {"base": 10000.0})),
    mutant("scaling-ignored", "scaling is the problem's (ops)", "rope/l*",
           with_problem("rope", lambda p: {"scaling": replace(RopeScaling(), freq_factors=p.scaling.freq_factors)})),
    mutant("llama3-as-linear", "llama3 scaling blends by wavelength", "rope/llama3*",
           with_problem("rope", lambda p: {"scaling": replace(p.scaling, kind=p.scaling.kind.replace(
               "llama3", "linear"))})),
    mutant("yarn-as-linear", "yarn scaling blends by the number of the pair", "rope/yarn*",
           with_problem("rope", lambda p: {"scaling": replace(p.scaling, kind=p.scaling.kind.replace(
               "yarn", "linear"))})),
    mutant("attention-factor-ignored", "the rotated values are multiplied by attention_factor (ops)", "rope/grown*",
           with_problem("rope", lambda p: {"attention_factor": 1.0})),
    mutant("whole-head-grows", "values beyond dim do not grow (ops)", "rope/grown*",
           with_result("rope", lambda p, pair: tuple(torch.cat([x[..., : p.dim], x[..., p.dim :] * p.attention_factor],
                                                               -1) for x in pair))),
    mutant("factors-ignored", "freq_factors divide the frequencies", "rope/freq_factors*",
           with_problem("rope", lambda p: {"scaling": replace(p.scaling, freq_factors=())})),
    mutant("narrow-angles", "angles are computed in f32 (ops)", "rope/*",
           before("rope", lambda q, k, positions: (q, k, positions.bfloat16().int()))),
    mutant("whole-head", "only the first dim values of a head turn (ops)", "rope/partial*",
           with_result("rope", lambda p, pair: tuple(torch.cat([x[..., : p.dim], x[..., p.dim :] * 0], -1)
                                                     for x in pair))),
    mutant("k-unturned", "queries and keys turn (ops)", "rope/*",
           with_call("rope", lambda p, run, q, k, positions: (run(q, k, positions)[0], k.clone()))),
    mutant("positions-from-1", "position 0 does not turn (ops)", "rope/*",
           before("rope", lambda q, k, positions: (q, k, (positions + 1).clamp(max=255)))),
)  # fmt: skip


# ---- experts ---------------------------------------------------------------------------------------------------


def ties_to_highest(p: Any, run: Any, logits: Tensor) -> Any:
    ids, probs = run(logits.flip(-1).contiguous())
    return (p.experts - 1 - ids).int(), probs


def drops_overflow(p: Any, run: Any, x: Tensor, ids: Tensor, mapping: Tensor, local: int) -> Any:
    rows, offsets, source = run(x, ids, mapping, local)
    at = torch.arange(len(rows))
    expert = torch.searchsorted(offsets[1:].contiguous(), at, right=True).clamp(max=local - 1)
    return torch.where((at - offsets[expert] < 2)[:, None], rows, 0), offsets, source


def backwards_within(p: Any, run: Any, x: Tensor, ids: Tensor, mapping: Tensor, local: int) -> Any:
    rows, offsets, source = run(x.flip(0).contiguous(), ids.flip(0).flip(1).contiguous(), mapping, local)
    return rows, offsets, (ids.numel() - 1 - source).int()


def skips_empty_experts(p: Any, run: Any, x: Tensor, w13: Any, w2: Any, offsets: Tensor, **biases: Any) -> Any:
    counts = offsets.diff()
    packed = torch.cat([counts[counts > 0], counts[counts == 0]])
    return run(x, w13, w2, torch.cat([offsets[:1], packed.cumsum(0)]).int(), **biases)


def reads_beyond(p: Any, run: Any, x: Tensor, w13: Any, w2: Any, offsets: Tensor, **biases: Any) -> Any:
    return run(x, w13, w2, torch.cat([offsets[:-1], offsets[-1:] * 0 + len(x)]).int(), **biases)


def biases_everywhere(p: Any, run: Any, x: Tensor, w13: Any, w2: Any, offsets: Tensor, **biases: Any) -> Any:
    out = run(x, w13, w2, offsets, **biases)
    return torch.where((torch.arange(len(x)) < offsets[-1])[:, None], out, biases["w2_bias"][-1]) if biases else out


def with_biases(change: Callable[[Tensor], Tensor]) -> Make:
    """Makes a mutant whose experts have `change(bias)` for each of their biases."""
    return with_call("grouped_mlp", lambda p, run, *args, **biases: run(
        *args, **{name: change(bias) for name, bias in biases.items()}))  # fmt: skip


def whole_mlp(p: Any, x: Tensor, ids: Tensor, probs: Tensor, w13: Any, w2: Any, expert_map: Tensor) -> Tensor:
    """The composite as one kernel that takes an expert elsewhere for local expert 0."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for j in range(ids.shape[1]):
        e = expert_map[ids[:, j].long()].clamp(min=0).long()
        gate, up = torch.einsum("th,tfh->tf", x.double(), dense(w13)[e].double()).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up if p.activation == "silu" else gate * up
        out += probs[:, j, None].double() * torch.einsum("tf,thf->th", hidden, dense(w2)[e].double())
    return out.to(x.dtype)


EXPERTS = (
    mutant("ties-to-highest", "ties go to the lowest index (ops)", "router_topk/ties*",
           with_call("router_topk", ties_to_highest)),
    mutant("unsorted", "the chosen experts are ordered (ops)", "router_topk/*",
           after("router_topk", lambda pair: tuple(x.flip(-1).contiguous() for x in pair))),
    mutant("softmax-other-side", "softmax before or after the choice is the problem's (ops)", "router_topk/*-k2-*",
           with_problem("router_topk", lambda p: {"softmax": {"before": "after", "after": "before"}[p.softmax]})),
    mutant("not-renormalised", "renormalise makes the weights sum to 1 (ops)", "router_topk/before-renormalise*",
           with_problem("router_topk", lambda p: {"renormalise": False})),
    mutant("scale-ignored", "scale multiplies the weights (ops)", "router_topk/before-renormalise*",
           with_problem("router_topk", lambda p: {"scale": 1.0})),
    mutant("groups-ignored", "only the best groups are eligible (ops)", "router_topk/groups*",
           with_problem("router_topk", lambda p: {"groups": 0})),
    mutant("narrow-weights", "router weights are f32 (ops)", "router_topk/*-bf16",
           after("router_topk", lambda pair: (pair[0], pair[1].bfloat16().float()))),
    mutant("elsewhere-is-0", "expert_map -1 is an expert elsewhere (ops)", "moe_dispatch/ep2*",
           before("moe_dispatch", lambda x, ids, mapping, local: (x, ids, mapping.clamp(min=0), local))),
    mutant("map-ignored", "expert_map gives the local index (weights)", "moe_dispatch/ep2_second*",
           before("moe_dispatch", lambda x, ids, mapping, local: (
               x, ids, torch.where(torch.arange(len(mapping)) < local, torch.arange(len(mapping)), -1).int(), local))),
    mutant("drops-overflow", "capacity is lossless: T * k (ops)", "moe_dispatch/*",
           with_call("moe_dispatch", drops_overflow)),
    mutant("backwards-within", "rows of an expert are in the order of their assignments", "moe_dispatch/*",
           with_call("moe_dispatch", backwards_within)),
    mutant("skips-empty", "an expert without rows is legal (ops)", "grouped_mlp/empty_expert*",
           with_call("grouped_mlp", skips_empty_experts)),
    mutant("reads-beyond", "rows after the last offset are 0 and not read", "grouped_mlp/beyond_is_nan*",
           with_call("grouped_mlp", reads_beyond)),
    mutant("biased-beyond", "rows after the last offset are 0, whatever the biases", "grouped_mlp/bias*",
           with_call("grouped_mlp", biases_everywhere)),
    mutant("one-bias-for-all", "each expert has biases of its own", "grouped_mlp/bias*",
           with_biases(lambda bias: bias[:1].expand_as(bias))),
    mutant("unlimited", "swigluoai cuts gate and up off at the limit", "grouped_mlp/*swigluoai*",
           with_problem("grouped_mlp", lambda p: {"swiglu_limit": 1e9} if p.swiglu_limit else {})),
    mutant("alpha-is-1", "swigluoai has the problem's alpha", "grouped_mlp/*swigluoai*",
           with_problem("grouped_mlp", lambda p: {"swiglu_alpha": 1.0} if p.swiglu_alpha else {})),
    mutant("always-silu", "the activation is the problem's", "expert_mlp/gelu*",
           with_problem("grouped_mlp", lambda p: {"activation": "silu"})),
    mutant("unweighted", "moe_combine multiplies by probs (ops)", "moe_combine/*",
           before("moe_combine", lambda rows, source, probs: (rows, source, probs * 0 + 1))),
    mutant("source-ignored", "source names the assignment of each row", "moe_combine/*",
           before("moe_combine", lambda rows, source, probs: (rows, torch.arange(len(source)).int(), probs))),
    mutant("whole-elsewhere-is-0", "a kernel for a whole composite keeps the rules of its parts (ops)",
           "expert_mlp/ep2*", with_added(recipe("whole_expert_mlp", "expert_mlp", given_problem(whole_mlp),
                                                layout=DENSE))),
)  # fmt: skip


# ---- logits and sampling ---------------------------------------------------------------------------------------


def params_with(**values: float) -> Make:
    """Makes a mutant whose sample takes these parameters for what they are not."""
    return before("sample", lambda logits, params, u: (
        logits, {**params, **{k: torch.full_like(params[k], v) for k, v in values.items()}}, u))  # fmt: skip


def in_descending_order(p: Any, run: Any, logits: Tensor, params: Any, u: Tensor) -> Tensor:
    order = logits.float().nan_to_num(-torch.inf).argsort(stable=True, dim=-1, descending=True)
    found = run(logits.gather(1, order), params, u).long()
    ids = order.gather(1, found.clamp(min=0)[:, None])[:, 0]
    return torch.where(found < 0, found, ids).int()


def top_p_first(p: Any, run: Any, logits: Tensor, params: Any, u: Tensor) -> Any:
    kept = logits.clone()
    for row, x in enumerate(logits.double().numpy()):
        if params["temperature"][row] > 0 and x.max() == x.max() > -math.inf:
            ids, _ = kept_tokens(x / float(params["temperature"][row]), 0, float(params["top_p"][row]), 0.0)
            kept[row] = -torch.inf
            kept[row, ids.copy()] = logits[row, ids.copy()]
    return run(kept, {**params, "top_p": params["top_p"] * 0}, u)


def all_ties_kept(p: Any, run: Any, logits: Tensor, params: Any, u: Tensor) -> Any:
    k = params["top_k"].clamp(1, p.vocab).long()
    least = logits.sort(-1, descending=True).values.gather(1, (k - 1)[:, None])
    out = (params["top_k"] > 0)[:, None] & (logits < least)
    return run(logits.masked_fill(out, -torch.inf), {**params, "top_k": params["top_k"] * 0}, u)


def first_row_for_all(logits: Tensor, params: Any, u: Tensor) -> tuple[Any, ...]:
    return logits, {key: value[:1].expand_as(value).contiguous() for key, value in params.items()}, u


def edits_with(**changes: Callable[[Any, Tensor], Tensor]) -> Make:
    """Makes a mutant whose apply_logits gets `change(problem, array)` of these arrays."""
    return with_call("apply_logits", lambda p, run, logits, **kw: run(logits, **{
        key: changes[key](p, value) if key in changes else value for key, value in kw.items()}))  # fmt: skip


def divided_all(p: Any, run: Any, logits: Tensor, **kw: Any) -> Any:
    if "edit_ids" not in kw:
        return run(logits, **kw)
    old = logits.gather(1, kw["edit_ids"].long().clamp(max=p.vocab - 1))
    scale = kw["edit_scale"]
    return run(logits, **{**kw, "edit_scale": torch.where((old > 0) | (scale == 0), scale, 1 / scale)})


def bits_from_the_top(p: Any, run: Any, logits: Tensor, *, mask: Any = None, **kw: Any) -> Any:
    if mask is None:
        return run(logits, **kw)
    words = mask.view(torch.int32)
    turned = sum((((words >> i) & 1) << (31 - i) for i in range(32)), torch.zeros_like(words))
    return run(logits, mask=turned.view(torch.uint32), **kw)


def whole_words(p: Any, run: Any, logits: Tensor, *, mask: Any = None, **kw: Any) -> Any:
    out = run(logits, **kw) if mask is None else run(logits, mask=mask, **kw)
    whole = p.vocab // 32 * 32
    return torch.cat([out[:, :whole], run(logits, **kw)[:, whole:]], -1)


LOGITS = (
    mutant("bits-from-the-top", "bit v % 32 of word v // 32 is token v (ops)", "apply_logits/mask-*",
           with_call("apply_logits", bits_from_the_top)),
    mutant("whole-words", "the mask has ceil(V / 32) words (ops)", "apply_logits/mask-v40*",
           with_call("apply_logits", whole_words)),
    mutant("large-negative", "a masked logit is -inf (ops)", "apply_logits/mask-*",
           after("apply_logits", lambda out: out.clamp(min=-1e4))),
    mutant("bias-ignored", "an edit's bias is added (ops)", "apply_logits/edits*",
           edits_with(edit_bias=lambda p, bias: bias * 0)),
    mutant("scale-ignored", "an edit's scale divides or multiplies (ops)", "apply_logits/edits*",
           edits_with(edit_scale=lambda p, scale: scale * 0)),
    mutant("zero-scale-taken", "a scale of 0 counts as 1 (ops)", "apply_logits/edits*",
           edits_with(edit_scale=lambda p, scale: scale.clamp(min=1e-6))),
    mutant("padding-wraps", "id V edits nothing (ops)", "apply_logits/edits_padding*",
           edits_with(edit_ids=lambda p, ids: ids.clamp(max=p.vocab - 1))),
    mutant("scale-divides-all", "a scale multiplies what is below 0 (ops)", "apply_logits/edits_signed*",
           with_call("apply_logits", divided_all)),
    mutant("edits-by-32768", "an edit lies anywhere in the vocabulary (ops)", "apply_logits/edits-vocabulary*",
           edits_with(edit_ids=lambda p, ids: torch.where(ids < 32768, ids, p.vocab).int())),
    mutant("vocabulary-of-32768", "a vocabulary has more tokens than a block (ops)", "sample/plain-v70000*",
           before("sample", lambda logits, params, u: (logits[:, :32768], params, u))),
    mutant("always-greedy", "a temperature above 0 samples (ops)", "sample/plain*", params_with(temperature=0.0)),
    mutant("never-greedy", "temperature 0 takes the largest logit, whatever else is set (step)", "sample/*",
           before("sample", lambda logits, params, u: (
               logits, {**params, "temperature": params["temperature"].clamp(min=1.0)}, u))),
    mutant("temperature-ignored", "the temperature divides the logits", "sample/hot*", params_with(temperature=1.0)),
    mutant("top-k-ignored", "top_k filters (ops)", "sample/top_k*", params_with(top_k=0)),
    mutant("top-p-ignored", "top_p filters (ops)", "sample/top_p*", params_with(top_p=0.0)),
    mutant("min-p-ignored", "min_p filters (ops)", "sample/min_p*", params_with(min_p=0.0), size="full"),
    mutant("typical-p-ignored", "typical_p filters (ops)", "sample/typical*", before(
        "sample", lambda logits, params, u: (logits, {**params, **{
            key: params[key] * 0 for key in ("typical_p",) if key in params}}, u))),
    mutant("typical-p-for-top-p", "typical_p keeps what is near the entropy, not the likeliest (ops)",
           "sample/typical_ladder*", before("sample", lambda logits, params, u: (logits, {
               **params, "top_p": params.get("typical_p", params["top_p"]), "typical_p": params["top_p"] * 0}, u))),
    mutant("zero-keeps-one", "all-zero parameters keep every token (step)", "sample/*", before(
        "sample", lambda logits, params, u: (logits, {**params, "top_k": params["top_k"].clamp(min=1)}, u))),
    mutant("top-p-first", "filters in their order: top_k, then top_p", "sample/*", with_call("sample", top_p_first)),
    mutant("all-ties-kept", "of equal logits the lowest ids are kept, exactly k", "sample/top_k_ties*",
           with_call("sample", all_ties_kept)),
    mutant("descending-order", "the inverse CDF runs over the kept tokens in id order (ops)", "sample/*",
           with_call("sample", in_descending_order)),
    mutant("first-row-for-all", "each row has its own parameters (step)", "sample/mixed_rows*",
           before("sample", first_row_for_all)),
    mutant("one-u-for-all", "each row has its own u (ops)", "sample/*",
           before("sample", lambda logits, params, u: (logits, params, u[:1].expand_as(u).contiguous()))),
    mutant("token-for-nan", "a row with a NaN or no kept token gives -1 (ops)", "sample/nan_and_empty_rows*",
           after("sample", lambda ids: ids.clamp(min=0))),
    mutant("vocabulary-of-16-bits", "ids are int32 (ops)", "argmax/vocabulary*",
           after("argmax", lambda ids: ids & 0xFFFF)),
    mutant("highest-wins", "the lowest index wins (ops)", "argmax/ties*",
           with_call("argmax", lambda p, run, logits: (p.vocab - 1 - run(logits.flip(-1).contiguous())).int())),
    mutant("padding-wins", "all-negative logits have a largest one", "argmax/all_negative*",
           with_call("argmax", lambda p, run, logits: run(
               torch.cat([logits, logits[:, :1] * 0], -1)).clamp(max=p.vocab - 1))),
    mutant("token-for-nan", "a row with a NaN or nothing above -inf gives -1 (ops)", "argmax/nan*",
           after("argmax", lambda ids: ids.clamp(min=0))),
    mutant("nothing-for-infinity", "+inf is a largest logit, and no NaN (ops)", "argmax/infinite*",
           with_call("argmax", lambda p, run, logits: run(logits).masked_fill((logits == torch.inf).any(-1), -1))),
    mutant("base-2", "logprobs are natural (ops)", "logprobs/*",
           after("logprobs", lambda out: (out[0] / math.log(2), out[1], out[2] / math.log(2)))),
    mutant("ties-to-highest", "ties go to the lowest id (ops)", "logprobs/ties*",
           with_call("logprobs", lambda p, run, logits, ids, k: (
               run(logits, ids, k)[0], (p.vocab - 1 - run(logits.flip(-1).contiguous(), ids, k)[1]).int(),
               run(logits, ids, k)[2]))),
    mutant("narrow", "logprobs are f32 (ops)", "logprobs/*-bf16",
           after("logprobs", lambda out: (out[0].bfloat16().float(), out[1], out[2].bfloat16().float()))),
)  # fmt: skip


# ---- what holds for every op -----------------------------------------------------------------------------------


def memo(key: Callable[[Tensor], Any]) -> Make:
    """Makes a mutant whose linear answers what it answered to the first argument with the same key."""

    def wrap(problem: Any, run: Any) -> Any:
        seen: dict[Any, Tensor] = {}

        def call(x: Tensor, *rest: Any, **kw: Any) -> Tensor:
            if key(x) not in seen:
                seen[key(x)] = run(x, *rest, **kw)
            return seen[key(x)].clone()

        return call

    return with_kernel("linear", wrap)


def in_place(p: Any, run: Any, x: Tensor, y: Tensor) -> Tensor:
    return x.copy_(run(x, y))


def packed_rows(x: Tensor) -> Tensor:
    """x as if its rows lay without gaps."""
    strides = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
    return torch.as_strided(x, x.shape, strides, x.storage_offset())


def without_reason(kernel: Kernel) -> Kernel:
    return replace(kernel, supports=lambda p: "" if p.width >= 32 else kernel.supports(p))


def once_live(then: Callable[[], Any]) -> Make:
    """Makes a mutant whose add does `then` on the first step that is not all zeros: not before a replay."""

    def call(p: Any, run: Any, x: Tensor, y: Tensor) -> Any:
        if x.any():
            then()
        return run(x, y)

    return with_call("add", call)


def broken(message: str) -> None:
    raise RuntimeError(message)


def claims_all(kernel: Kernel) -> Kernel:
    def bind(problem: Any, session: Any) -> Any:
        assert kernel.supports(problem) is None, f"{kernel.name} cannot run {problem.describe()}"
        return kernel.bind(problem, session)

    return replace(kernel, supports=lambda problem: None, bind=bind)


ANY_OP = (
    mutant("memoizes-shape", "an op answers by its operands' values", "linear/decode/*", memo(lambda x: x.shape)),
    mutant("memoizes-identity", "an op answers by its operands' values", "linear/decode/*",
           memo(lambda x: x.data_ptr())),
    mutant("writes-operand", "inputs are read-only, outputs fresh (ops)", "add/*", with_call("add", in_place)),
    mutant("packed-rows-assumed", "a kernel accepts a row stride or declines (ops)", "silu_mul/strided/*",
           before("silu_mul", lambda x: (packed_rows(x),))),
    mutant("packed-heads-assumed", "a kernel accepts a row stride or declines (ops)", "rope/strided/*",
           before("rope", lambda q, k, positions: (packed_rows(q), packed_rows(k), positions))),
    mutant("packed-ids-assumed", "a kernel accepts vectors with a stride, or declines (ops)", "gather_rows/strided/*",
           before("gather_rows", lambda x, rows: (x, packed_rows(rows)))),
    mutant("packed-bias-assumed", "a kernel accepts vectors with a stride, or declines (ops)", "linear/strided/bias/*",
           with_call("linear", lambda p, run, x, w, **kw: run(
               x, w, **{name: packed_rows(dense(item)) for name, item in kw.items()}))),
    mutant("wider-result", "results have the dtype of the op (ops)", "add/*-bf16",
           after("add", lambda out: out.float())),
    mutant("flat-result", "results have the shape of the op (ops)", "silu_mul/*",
           after("silu_mul", lambda out: out.flatten())),
    mutant("no-reason", "a kernel declines with a reason", "silu_mul/*", with_kernels(without_reason, "silu_mul")),
    mutant("claims-then-raises", "a claim that then raises is a failure (kernels)", "rope/*-f64",
           with_kernels(claims_all, "rope"), size="full"),
    mutant("raises-in-replay", "a claimed kernel runs (kernels)", "add/*", once_live(lambda: broken("no more"))),
    mutant("exits", "a backend that ends its process fails", "add/*", once_live(lambda: os._exit(3)), fatal=True),
    mutant("crashes", "a backend that crashes fails", "add/*", once_live(lambda: ctypes.string_at(0)), fatal=True),
    mutant("hangs", "a backend that hangs fails", "add/*", once_live(lambda: time.sleep(3600)), fatal=True),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (*CACHE, *ROWS, *ROPE, *EXPERTS, *LOGITS, *ANY_OP)
