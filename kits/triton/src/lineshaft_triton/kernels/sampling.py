"""Sampling by inverse CDF, with filters by threshold search instead of a sort of the vocabulary.

Tokens that top-k or top-p keep are a prefix of the descending order, so one value (the cut) and the last kept id among
those equal to it describe them. The cut is searched on the integer keys of the values, which have their order: a pass
over a row tries several pivots and counts, or weighs, what lies above each. So do radix selection (Alabi et al., "Fast
k-selection algorithms for graphics processing units", 2012) and FlashInfer's sampling without a sort; the latter draws
and rejects, this one is exact: a pass narrows the bracket to values that are there, until one is left.

Weights exp((x - peak) / temperature) count as integers, in units of 2^-FRACTION of the largest. Their sums are exact in
any order, so passes agree with each other, and results do not depend on how a row is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import SampleProblem
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_triton.kernels.logits_scan import extremes, key_of, pivot_config, scan_config, span_config, value_of
from lineshaft_triton.kernels.rowwise import common_fields, empty, gapless, strided
from lineshaft_triton.launch import launch
from lineshaft_triton.targets import Target

PARAMS = ("temperature", "top_k", "top_p", "min_p")
BITS = 62
"""Bits of a sum of all weights of a row."""


@triton.jit
def scale_of(heat):
    """What logits are multiplied with before they are exponents of 2; finite for the smallest temperatures too."""
    return tl.minimum(1.4426950408889634 / tl.where(heat > 0, heat, 1.0), 3.0e38)


@triton.jit
def drawn(heat, values_ptr, out_ptr, row):
    """Which rows a token is drawn for: those with a temperature, and a token, none of which is +inf."""
    return (heat > 0) & (tl.load(out_ptr + row) >= 0) & (tl.load(values_ptr + row) < float("inf"))


@triton.jit
def measure(x_row, at, vocab, peak, scale, cut, last, least, TIES: tl.constexpr, FRACTION: tl.constexpr):
    """int64 [ROWS, BLOCK] of the tokens `at`: for TIES 1 of those equal to `cut`, else the weights if at least `least`
    of those above it, or equal to it up to id `last`. A kept token has at least one unit, so that u = 0 takes the first
    one, unless its weight is none in float64 either."""
    x = tl.load(x_row + at, at < vocab, float("-inf")).to(tl.float32)
    if TIES:
        units = (x == cut[:, None]).to(tl.int64)
    else:
        exponent = (x - peak[:, None]) * scale[:, None]
        weight = tl.exp2(exponent)
        kept = (x > cut[:, None]) | ((x == cut[:, None]) & (at <= last[:, None]))
        kept = kept & (weight >= least[:, None]) & (exponent > -1074.0)
        units = tl.where(kept, tl.maximum(weight * 2.0**FRACTION, 1.0), 0.0).to(tl.int64)
    return units


@triton.jit
def find_cut(
    x_row, vocab, peak, scale, low, target, wanted, MASS: tl.constexpr, FRACTION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The smallest value of each `wanted` row with less than `target` above it, and how much that is: for MASS weights
    are summed, else tokens counted. It lies between `low` and `peak`, float32 [ROWS]."""
    low = tl.where(wanted, key_of(low), 0).to(tl.int64)
    high = tl.where(wanted, key_of(peak), 0).to(tl.int64)
    above = tl.full((ROWS,), 0, tl.int64)
    part = tl.arange(0, PIVOTS)[None, :] + 1
    share = part.to(tl.float32) / (PIVOTS + 1)
    between_values = True
    while tl.max(high - low) > 0:
        # pivots, by turns at equal distances between values and, which bounds the number of passes, between keys
        bottom, top = value_of(low.to(tl.int32)), value_of(high.to(tl.int32))
        by_value = key_of(bottom[:, None] * (1 - share) + top[:, None] * share).to(tl.int64)
        by_key = low[:, None] + (high - low)[:, None] * part // (PIVOTS + 1)
        pivots = tl.where(between_values, by_value, by_key)
        pivots = tl.maximum(tl.minimum(pivots, high[:, None] - 1), low[:, None])
        between_values = not between_values
        # what lies above each, and the outermost values within the bracket
        bounds = value_of(pivots.to(tl.int32))[:, None, :]
        sums = tl.full((ROWS, BLOCK, PIVOTS), 0, tl.int64 if MASS else tl.int32)
        first = tl.full((ROWS, BLOCK, 1), float("inf"), tl.float32)
        last = tl.full((ROWS, BLOCK, 1), float("-inf"), tl.float32)
        for start in tl.range(0, vocab, BLOCK, num_stages=AHEAD):
            at = start + tl.arange(0, BLOCK)[None, :, None]
            x = tl.load(x_row[:, :, None] + at, at < vocab, float("-inf")).to(tl.float32)
            if MASS:
                weight = tl.exp2((x - peak[:, None, None]) * scale[:, None, None])
                sums += tl.where(x > bounds, (weight * 2.0**FRACTION).to(tl.int64), 0)
            else:
                sums += (x > bounds).to(tl.int32)
            first = tl.minimum(first, tl.where(x >= bottom[:, None, None], x, float("inf")))
            last = tl.maximum(last, tl.where(x <= top[:, None, None], x, float("-inf")))
        # the new bracket
        found = tl.sum(sums, 1).to(tl.int64)
        enough = found >= target[:, None]
        begun = key_of(tl.reshape(tl.min(first, 1), (ROWS,))).to(tl.int64)
        ended = key_of(tl.reshape(tl.max(last, 1), (ROWS,))).to(tl.int64)
        begun = tl.maximum(begun, tl.max(tl.where(enough, pivots + 1, low[:, None]), 1))
        ended = tl.minimum(ended, tl.min(tl.where(enough, high[:, None], pivots), 1))
        above = tl.where(low < high, tl.maximum(above, tl.max(tl.where(enough, 0, found), 1)), above)
        low, high = tl.where(low < high, begun, low), tl.where(low < high, ended, high)
    return value_of(high.to(tl.int32)), above


@triton.jit
def first_beyond(
    x_row, vocab, peak, scale, cut, last, least, u, target, TIES: tl.constexpr, FRACTION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The first id of each row at which the running sum of `measure` is above `target`, or without TIES above the share
    `u` of the whole sum: found among sums of SPAN values first, and then in one of these."""
    span = tl.arange(0, COUNT)[None, :]
    sums = tl.full((ROWS, COUNT), 0, tl.int64)
    for begin in range(0, vocab, SPAN):
        inner = tl.full((ROWS, BLOCK), 0, tl.int64)
        for start in tl.range(begin, tl.minimum(begin + SPAN, vocab), BLOCK, num_stages=AHEAD):
            at = start + tl.arange(0, BLOCK)[None, :]
            inner += measure(x_row, at, vocab, peak, scale, cut, last, least, TIES, FRACTION)
        sums = tl.where(span == begin // SPAN, tl.sum(inner, 1)[:, None], sums)
    running = tl.cumsum(sums, 1)
    whole = tl.max(running, 1)
    if not TIES:
        target = (u.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, whole - 1)
    passed = running <= target[:, None]
    found = tl.sum(passed.to(tl.int32), 1) * SPAN
    reached = tl.max(tl.where(passed, running, 0), 1)
    place = found[:, None]
    for start in range(0, SPAN, BLOCK):
        at = place + start + tl.arange(0, BLOCK)[None, :]
        own = measure(x_row, at, vocab, peak, scale, cut, last, least, TIES, FRACTION)
        total = reached[:, None] + tl.cumsum(own, 1)
        found += tl.sum((total <= target[:, None]).to(tl.int32), 1)
        reached = tl.max(total, 1)
    return found


@triton.jit
def range_kernel(
    logits_ptr, values_ptr, last_ptr, out_ptr, rows, stride, vocab,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Each row's largest value and its cut, into `values` [2, R], which is the smallest value above -inf for now; the
    last kept id of those equal to the cut; and the lowest id of the largest, or -1 for a row without a token."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = place < rows
    x_row = logits_ptr + tl.minimum(place, rows - 1).to(tl.int64)[:, None] * stride
    peak, ids, least = extremes(x_row, vocab, ROWS, BLOCK, AHEAD)
    tl.store(out_ptr + place, tl.where((peak > float("-inf")) & (least > float("-inf")), ids, -1), own)
    tl.store(values_ptr + place, peak, own)
    tl.store(values_ptr + rows + place, least, own)
    tl.store(last_ptr + place, tl.full((ROWS,), 0, tl.int32) + vocab, own)


@triton.jit
def cut_kernel(
    logits_ptr, temperature_ptr, limit_ptr, values_ptr, last_ptr, out_ptr, rows, stride, vocab,
    MASS: tl.constexpr, FRACTION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
    SPAN: tl.constexpr, COUNT: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """Raises the cut of each row that is drawn and limited: by the top-k, or for MASS by the top-p of what is kept."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(place, rows - 1)
    heat, limit = tl.load(temperature_ptr + row), tl.load(limit_ptr + row)
    wanted = drawn(heat, values_ptr, out_ptr, row) & (limit > 0) & (limit < (1 if MASS else vocab))
    if tl.max(wanted.to(tl.int32)) > 0:
        x_row = logits_ptr + row.to(tl.int64)[:, None] * stride
        scale = scale_of(heat)
        peak, cut, last = tl.load(values_ptr + row), tl.load(values_ptr + rows + row), tl.load(last_ptr + row)
        low = cut
        # a token is kept if less than `target` comes before it: k tokens, or the share p of the mass, rounded up
        if MASS:
            mass = tl.full((ROWS, BLOCK), 0, tl.int64)
            for start in tl.range(0, vocab, BLOCK, num_stages=AHEAD):
                at = start + tl.arange(0, BLOCK)[None, :]
                x = tl.load(x_row + at, at < vocab, float("-inf")).to(tl.float32)
                weight = tl.exp2((x - peak[:, None]) * scale[:, None]) * 2.0**FRACTION
                kept = (x > cut[:, None]) | ((x == cut[:, None]) & (at <= last[:, None]))
                mass += tl.where(kept, weight, 0.0).to(tl.int64)
            share = limit.to(tl.float64) * tl.sum(mass, 1).to(tl.float64)
            target = share.to(tl.int64)
            target += (target.to(tl.float64) < share).to(tl.int64)
            low = tl.maximum(cut, peak - (FRACTION + 1) / scale)  # what is less weighs nothing
        else:
            target = limit.to(tl.int64)
        found, above = find_cut(
            x_row, vocab, peak, scale, low, target, wanted, MASS, FRACTION, ROWS, BLOCK, AHEAD, PIVOTS
        )
        # of those equal to the cut, as many of the lowest ids as reach the target
        target -= above + 1
        if MASS:
            each = (tl.exp2((found - peak) * scale) * 2.0**FRACTION).to(tl.int64)
            target = target // tl.maximum(each, 1)
        at = first_beyond(
            x_row, vocab, peak, scale, found, last, limit, limit, target, True, FRACTION,
            ROWS, BLOCK, AHEAD, SPAN, COUNT,
        )  # fmt: skip
        wanted = wanted & (place < rows)
        tl.store(last_ptr + place, tl.where(found == cut, tl.minimum(last, at), at), wanted)
        tl.store(values_ptr + rows + place, found, wanted)


@triton.jit
def draw_kernel(
    logits_ptr, temperature_ptr, min_p_ptr, u_ptr, values_ptr, last_ptr, out_ptr, rows, stride, vocab,
    FRACTION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The first kept token, of at least min-p, whose cumulative share exceeds u; greedy rows stay as they are."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(place, rows - 1)
    heat = tl.load(temperature_ptr + row)
    wanted = drawn(heat, values_ptr, out_ptr, row)
    if tl.max(wanted.to(tl.int32)) > 0:
        x_row = logits_ptr + row.to(tl.int64)[:, None] * stride
        min_p, u = tl.load(min_p_ptr + row), tl.load(u_ptr + row)
        peak, cut, last = tl.load(values_ptr + row), tl.load(values_ptr + rows + row), tl.load(last_ptr + row)
        at = first_beyond(
            x_row, vocab, peak, scale_of(heat), cut, last, min_p, u, last.to(tl.int64), False, FRACTION,
            ROWS, BLOCK, AHEAD, SPAN, COUNT,
        )  # fmt: skip
        tl.store(out_ptr + place, at, wanted & (place < rows))


def supports(problem: SampleProblem) -> str | None:
    if problem.dtype == "float64":
        return "orders values by their bits in float32, which is too narrow for float64"
    return None


def bind_sample(where: Target, problem: SampleProblem, session: Any) -> Callable[..., torch.Tensor]:
    scan = scan_config(problem.rows, problem.vocab, where)
    sums = span_config(scan, problem.vocab)
    search = pivot_config(sums)
    fraction = BITS - (problem.vocab - 1).bit_length()

    def make_state() -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.empty((2, problem.rows), dtype=torch.float32, device=session.device)
        return values, torch.empty((problem.rows,), dtype=torch.int32, device=session.device)

    def sample(
        logits: torch.Tensor, params: Mapping[str, torch.Tensor], u: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """logits [R, V], {temperature, top_p, min_p: f32[R], top_k: int32[R]}, u f32[R, 1] -> int32[R]: filters by
        top-k, then top-p, then min-p, and takes the first kept id whose cumulative share exceeds u; temperature 0 takes
        the lowest id of the largest logit; -1 for a row with a NaN or nothing above -inf."""
        logits, (_, stride, _) = strided(logits)
        rows, vocab = logits.shape
        out = empty(out, (rows,), logits, torch.int32)
        values, last = session.constant(("triton_sample", rows), make_state)
        heat, top_k, top_p, min_p = (gapless(params[name]) for name in PARAMS)
        grid, sizes = (triton.cdiv(rows, scan.block["ROWS"]),), (rows, stride, vocab)
        state = values, last, out
        launch(session, range_kernel, grid, scan, logits, *state, *sizes)
        for limit, mass in ((top_k, False), (top_p, True)):
            launch(session, cut_kernel, grid, search, logits, heat, limit, *state, *sizes, MASS=mass, FRACTION=fraction)
        launch(session, draw_kernel, grid, sums, logits, heat, min_p, gapless(u), *state, *sizes, FRACTION=fraction)
        return out

    return sample


def recipes(where: Target) -> list[Recipe]:
    fields = common_fields(where) | {"supports": supports}
    return [recipe("triton_sample", "sample", partial(bind_sample, where), **fields)]
