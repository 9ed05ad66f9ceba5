"""Logits as they are: the largest of each row, edits and masks, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import SampleProblem
from lineshaft_torch.bound import Recipe, recipe
from lineshaft_triton.kernels.logits_scan import extremes, key_of, scan_config, value_of
from lineshaft_triton.kernels.rowwise import common_fields, declines_float64, empty, gapless, grid_over, strided, tiles
from lineshaft_triton.launch import launch
from lineshaft_triton.targets import Target

TOP = 64
"""Alternatives that `logprobs` looks for, at most: it takes them one by one."""


@triton.jit
def argmax_kernel(
    logits_ptr, out_ptr, rows, stride, vocab, ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_row = logits_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride
    peak, first, least = extremes(x_row, vocab, ROWS, BLOCK, AHEAD)
    tl.store(out_ptr + row, tl.where((peak > float("-inf")) & (least > float("-inf")), first, -1), row < rows)


@triton.jit
def mask_kernel(
    logits_ptr, mask_ptr, out_ptr, rows, stride, words, vocab,
    MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < vocab)
    x = tl.load(logits_ptr + row * stride + at, inside, 0.0)
    if MASK:
        word = tl.load(mask_ptr + row * words + at // 32, inside, 0)
        x = tl.where((word >> (at % 32)) & 1 != 0, x, float("-inf"))
    tl.store(out_ptr + row * vocab + at, x, inside)


@triton.jit
def edit_kernel(
    logits_ptr, mask_ptr, ids_ptr, scale_ptr, bias_ptr, out_ptr, rows, stride, words, vocab, edits,
    MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    ids = tl.load(ids_ptr + row * edits + at, (row < rows) & (at < edits), vocab)
    inside = ids < vocab
    if MASK:  # `mask_kernel` has written what is not allowed
        word = tl.load(mask_ptr + row * words + ids // 32, inside, 0)
        inside = inside & ((word >> (ids % 32)) & 1 != 0)
    scale = tl.load(scale_ptr + row * edits + at, inside, 1.0)
    bias = tl.load(bias_ptr + row * edits + at, inside, 0.0)
    x = tl.load(logits_ptr + row * stride + ids, inside, 0.0)
    wide = x.to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(out_ptr + row * vocab + ids, (tl.where(wide > 0, wide / scale, wide * scale) + bias).to(x.dtype), inside)


@triton.jit
def logprobs_kernel(
    logits_ptr, ids_ptr, chosen_ptr, top_ids_ptr, top_ptr, rows, stride, vocab,
    TOP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_row = logits_ptr + tl.minimum(row, rows - 1)[:, None] * stride
    none: tl.constexpr = -(2**31)  # the key of no float
    # the largest value of each row, and of each block of it
    block = tl.arange(0, COUNT)[None, :]
    largest = tl.full((ROWS, COUNT), none, tl.int32)
    best = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=AHEAD):
        at = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_row + at, at < vocab, float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("-inf"))
        best = tl.maximum(best, x)
        if TOP > 0:
            keys = tl.where(at < vocab, key_of(x), none)
            largest = tl.where(block == start // BLOCK, tl.max(keys, 1)[:, None], largest)
    peak = tl.max(best, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    # the logarithm of the sum
    total = tl.full((ROWS, BLOCK), 0, tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=AHEAD):
        at = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_row + at, at < vocab, float("-inf")).to(tl.float32)
        total += tl.exp(x - peak[:, None])
    norm = tl.log(tl.sum(total, 1))
    ids = tl.maximum(tl.load(ids_ptr + row, row < rows, 0), 0)
    chosen = tl.load(logits_ptr + row * stride + ids, row < rows, 0.0).to(tl.float32)
    tl.store(chosen_ptr + row, chosen - peak - norm, row < rows)
    # the next one in descending order: it lies in the first block of the largest value
    before = tl.full((ROWS,), 2**31 - 1, tl.int32)
    before_at = tl.full((ROWS,), -1, tl.int32)
    for place in range(TOP):
        key = tl.max(largest, 1)
        found = tl.min(tl.where(largest == key[:, None], block, COUNT), 1)
        at = found[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_row + at, at < vocab, float("-inf")).to(tl.float32)
        keys = tl.where(at < vocab, key_of(tl.where(x == x, x, float("-inf"))), none)
        fresh = (key < before)[:, None] | (at > before_at[:, None])
        first = tl.min(tl.where((keys == key[:, None]) & fresh, at, vocab), 1)
        later = (keys < key[:, None]) | ((keys == key[:, None]) & (at > first[:, None]))
        largest = tl.where(block == found[:, None], tl.max(tl.where(later, keys, none), 1)[:, None], largest)
        before, before_at = key, first
        tl.store(top_ids_ptr + row * TOP + place, first, row < rows)
        tl.store(top_ptr + row * TOP + place, value_of(key) - peak - norm, row < rows)


def bind_argmax(where: Target, problem: SampleProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = scan_config(problem.rows, problem.vocab, where)

    def argmax(logits: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """logits [R, V] -> int32[R]: the lowest id of the largest; -1 for a row with a NaN or nothing above -inf."""
        logits, (_, stride, _) = strided(logits)
        rows, vocab = logits.shape
        out = empty(out, (rows,), logits, torch.int32)
        grid = (triton.cdiv(rows, config.block["ROWS"]),)
        launch(session, argmax_kernel, grid, config, logits, out, rows, stride, vocab)
        return out

    return argmax


def bind_apply(where: Target, problem: SampleProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = tiles(problem.rows, problem.vocab, where)
    editing = tiles(problem.rows, max(1, problem.edits), where)

    def apply_logits(
        logits: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        edit_ids: torch.Tensor | None = None,
        edit_scale: torch.Tensor | None = None,
        edit_bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """logits [R, V] -> x / scale where x > 0, else x * scale (0: 1), plus bias, at edit_ids int32[R, K] (V: none),
        with edit_scale, edit_bias f32[R, K]; then -inf where the bit of mask uint32[R, ceil(V / 32)] is clear.

        All is copied and masked first; then what is edited is computed from the logits and written over it.
        """
        logits, (_, stride, _) = strided(logits)
        rows, vocab = logits.shape
        out = empty(out, (rows, vocab), logits)
        bits = logits if mask is None else gapless(mask)
        words, masked = bits.shape[1], mask is not None
        grid = grid_over(rows, vocab, config)
        launch(session, mask_kernel, grid, config, logits, bits, out, rows, stride, words, vocab, MASK=masked)
        if edit_ids is not None and edit_scale is not None and edit_bias is not None:
            ids, scale, bias = gapless(edit_ids), gapless(edit_scale), gapless(edit_bias)
            count = ids.shape[1]
            launch(
                session, edit_kernel, grid_over(rows, count, editing), editing, logits, bits, ids, scale, bias, out,
                rows, stride, words, vocab, count, MASK=masked,
            )  # fmt: skip
        return out

    return apply_logits


Logprobs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def bind_logprobs(where: Target, problem: SampleProblem, session: Any) -> Callable[..., Logprobs]:
    config = scan_config(problem.rows, problem.vocab, where)
    count = triton.next_power_of_2(triton.cdiv(problem.vocab, config.block["BLOCK"]))

    def logprobs(logits: torch.Tensor, ids: torch.Tensor, k: int, *, out: Logprobs | None = None) -> Logprobs:
        """logits [R, V], ids int32[R] (-1 is read as 0) -> (chosen f32[R], top ids int32[R, k], top f32[R, k]): natural
        logarithms of the softmax, in descending order, ties to the lowest id."""
        logits, (_, stride, _) = strided(logits)
        rows, vocab = logits.shape
        chosen, top_ids, top = out or (
            empty(None, (rows,), logits, torch.float32),
            empty(None, (rows, k), logits, torch.int32),
            empty(None, (rows, k), logits, torch.float32),
        )
        launch(
            session, logprobs_kernel, (triton.cdiv(rows, config.block["ROWS"]),), config, logits, gapless(ids), chosen,
            top_ids, top, rows, stride, vocab, TOP=k, COUNT=count,
        )  # fmt: skip
        return chosen, top_ids, top

    return logprobs


def supports_logprobs(problem: SampleProblem) -> str | None:
    if problem.top > TOP:
        return f"looks for at most {TOP} alternatives, not {problem.top}"
    return declines_float64(problem)


def recipes(where: Target) -> list[Recipe]:
    common = common_fields(where)
    edits = frozenset({"mask", "edits"})
    return [
        recipe("triton_argmax", "argmax", partial(bind_argmax, where), **common),
        recipe("triton_apply_logits", "apply_logits", partial(bind_apply, where), handles=edits, **common),
        recipe(
            "triton_logprobs", "logprobs", partial(bind_logprobs, where), **common | {"supports": supports_logprobs}
        ),
    ]
