"""Row lookups: `embed`, `gather_rows` and `merge_rows`, each a copy of rows that an index names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from lineshaft_contract.problems import EmbedProblem, PointwiseProblem
from lineshaft_torch.bound import DENSE, Recipe, dense, recipe
from lineshaft_triton.kernels.rowwise import common_fields, empty, gapless, grid_over, strided, tiles
from lineshaft_triton.launch import launch
from lineshaft_triton.targets import Target


@triton.jit
def embed_kernel(
    ids_ptr, table_ptr, start_ptr, out_ptr, rows, vocab, width, scale,
    SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < width)
    local = tl.load(ids_ptr + row, row < rows, 0) - tl.load(start_ptr)
    found = inside & (local >= 0) & (local < vocab)
    x = tl.load(table_ptr + local.to(tl.int64) * width + at, found, 0.0)
    if SCALED:
        x = (x.to(tl.float32) * scale).to(x.dtype)
    tl.store(out_ptr + row.to(tl.int64) * width + at, x, inside)


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, rows, x_stride, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < width)
    index = tl.load(index_ptr + row, row < rows, 0).to(tl.int64)
    tl.store(out_ptr + row.to(tl.int64) * width + at, tl.load(x_ptr + index * x_stride + at, inside), inside)


@triton.jit
def merge_kernel(
    x_ptr, embeds_ptr, source_ptr, out_ptr, rows, x_stride, embeds_stride, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < width)
    source = tl.load(source_ptr + row, row < rows, 0).to(tl.int64)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + at, inside & (source < 0), 0.0)
    chosen = tl.load(embeds_ptr + source * embeds_stride + at, inside & (source >= 0), 0.0)
    tl.store(out_ptr + row.to(tl.int64) * width + at, tl.where(source < 0, x, chosen), inside)


def bind_embed(where: Target, problem: EmbedProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = tiles(problem.rows, problem.width, where)

    def embed(
        ids: torch.Tensor, table: Any, vocab_start: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids int32[T], table [V, H], vocab_start int32[1] -> table[ids - vocab_start] * scale [T, H], rounded once;
        0 where that lies outside the table."""
        table = dense(table)
        rows, width = ids.shape[0], table.shape[1]
        out = empty(out, (rows, width), table)
        launch(
            session, embed_kernel, grid_over(rows, width, config), config, gapless(ids), table, vocab_start, out,
            rows, table.shape[0], width, problem.scale, SCALED=problem.scale != 1.0,
        )  # fmt: skip
        return out

    return embed


def bind_gather(where: Target, problem: PointwiseProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = tiles(problem.rows, problem.width, where)

    def gather_rows(x: torch.Tensor, rows: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, H], rows int32[R] -> x[rows] [R, H]."""
        (x, (_, stride, _)), rows = strided(x), gapless(rows)
        count, width = rows.shape[0], x.shape[1]
        out = empty(out, (count, width), x)
        launch(session, gather_kernel, grid_over(count, width, config), config, x, rows, out, count, stride, width)
        return out

    return gather_rows


def bind_merge(where: Target, problem: PointwiseProblem, session: Any) -> Callable[..., torch.Tensor]:
    config = tiles(problem.rows, problem.width, where)

    def merge_rows(
        x: torch.Tensor, embeds: torch.Tensor, source: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, H], embeds [M, H], source int32[T] -> embeds[source[t]] where source[t] >= 0, else x[t] [T, H]."""
        (x, (_, stride, _)), (embeds, (_, other, _)) = strided(x), strided(embeds)
        rows, width = x.shape
        out = empty(out, x.shape, x)
        grid = grid_over(rows, width, config)
        launch(session, merge_kernel, grid, config, x, embeds, gapless(source), out, rows, stride, other, width)
        return out

    return merge_rows


def recipes(where: Target) -> list[Recipe]:
    common = common_fields(where)
    return [
        recipe(
            "triton_embed", "embed", partial(bind_embed, where), layout=DENSE, handles=frozenset({"scale"}), **common
        ),
        recipe("triton_gather_rows", "gather_rows", partial(bind_gather, where), **common),
        recipe("triton_merge_rows", "merge_rows", partial(bind_merge, where), **common),
    ]
