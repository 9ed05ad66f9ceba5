"""Row lookups: `embed`, `gather_rows`, `merge_rows`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import FUZZ_DTYPES, seeded, short, variants
from lineshaft_contract.ops.checks import expect, weight_problem
from lineshaft_contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance, WeightArg
from lineshaft_contract.problems import EmbedProblem, PointwiseProblem, itemsize
from lineshaft_contract.steps import ArraySpec


def specs() -> tuple[OpSpec, ...]:
    return (_embed_spec(), _gather_spec(), _merge_spec())


def _embed_spec() -> OpSpec:
    return OpSpec(
        name="embed",
        signature="embed(ids int32[T], table [V, H], vocab_start int32[1]) -> [T, H]; 0 outside the shard",
        problem=EmbedProblem,
        specialise=_specialise_embed,
        infer=lambda p, call: ArraySpec((p.rows, p.width), p.dtype),
        reference=embed,
        cases=_embed_cases,
        fuzz=_fuzz_embed,
        tolerance=Tolerance(exact=True),
        weight="embed",
        moved=lambda p: 2 * p.rows * p.width * itemsize(p.dtype),
    )


def _gather_spec() -> OpSpec:
    return OpSpec(
        name="gather_rows",
        signature="gather_rows(x [T, H], rows int32[R]) -> [R, H]; every index is in range",
        problem=PointwiseProblem,
        specialise=_specialise_gather,
        infer=lambda p, call: ArraySpec((p.rows, p.width), p.dtype),
        reference=gather_rows,
        cases=_gather_cases,
        fuzz=_fuzz_gather,
        tolerance=Tolerance(exact=True),
        moved=lambda p: 2 * p.rows * p.width * itemsize(p.dtype),
    )


def _merge_spec() -> OpSpec:
    return OpSpec(
        name="merge_rows",
        signature="merge_rows(x [T, H], embeds [M, H], source int32[T]) -> [T, H]; source -1 keeps the row of x",
        problem=PointwiseProblem,
        specialise=_specialise_merge,
        infer=lambda p, call: call.spec(0),
        reference=merge_rows,
        cases=_merge_cases,
        tolerance=Tolerance(exact=True),
        required=False,
        moved=lambda p: 2 * p.rows * p.width * itemsize(p.dtype),
    )


# ---- references ------------------------------------------------------------------------------------------------


def embed(
    problem: EmbedProblem, ids: HostArray, table: HostArray, vocab_start: HostArray, *, num: Numerics = EXACT
) -> HostArray:
    """Rows ids - vocab_start of the table times `scale`, rounded once; zeros where that lies outside [0, V)."""
    local = ids.astype(np.int64) - int(vocab_start[0])
    inside = (local >= 0) & (local < table.shape[0])
    rows = num.load(table[np.where(inside, local, 0)]) * problem.scale
    return num.save(np.where(inside[:, None], rows, 0.0))


def gather_rows(problem: PointwiseProblem, x: HostArray, rows: HostArray, *, num: Numerics = EXACT) -> HostArray:
    """x [T, H], rows int32[R] -> x[rows] [R, H]."""
    return num.save(num.load(x[rows]))


def merge_rows(
    problem: PointwiseProblem, x: HostArray, embeds: HostArray, source: HostArray, *, num: Numerics = EXACT
) -> HostArray:
    """embeds[source[t]] where source[t] >= 0, else x[t]."""
    chosen = num.load(embeds[np.maximum(source, 0)])
    return num.save(np.where((source >= 0)[:, None], chosen, num.load(x)))


# ---- shapes ----------------------------------------------------------------------------------------------------


def _specialise_embed(base: Any, call: Call) -> EmbedProblem:
    problem = weight_problem("embed", base, call.args[1], "embed", EmbedProblem)
    ids = expect("embed", "ids", call.args[0], (None,), "int32")
    expect("embed", "vocab_start", call.args[2], (1,), "int32")
    return replace(problem, rows=ids.shape[0])


def _specialise_gather(base: Any, call: Call) -> PointwiseProblem:
    x = expect("gather_rows", "x", call.args[0], (None, None))
    rows = expect("gather_rows", "rows", call.args[1], (None,), "int32")
    return PointwiseProblem(dtype=x.dtype, rows=rows.shape[0], width=x.shape[1])


def _specialise_merge(base: Any, call: Call) -> PointwiseProblem:
    x = expect("merge_rows", "x", call.args[0], (None, None))
    expect("merge_rows", "embeds", call.args[1], (None, x.shape[1]), x.dtype)
    expect("merge_rows", "source", call.args[2], x.shape[:1], "int32")
    return PointwiseProblem(dtype=x.dtype, rows=x.shape[0], width=x.shape[1])


# ---- cases -----------------------------------------------------------------------------------------------------


_SHARDS = {  # rows of the shard, vocab_start, rows of all shards
    "whole-v32": (32, 0, 32, ""),
    "first_shard-v16": (16, 0, 48, "0 outside the shard"),
    "middle_shard-v16": (16, 16, 48, "vocab_start is honoured; 0 on both sides of the shard"),
    "last_shard-v16": (16, 32, 48, "vocab_start is honoured"),
    "vocabulary-v70000": (70_000, 0, 70_000, "ids are int32, as vocabularies need"),
    "scaled-v16": (16, 16, 48, "rows grow by the scale, a power of two here: so no rounding"),
    "outside-v8": (8, 40, 40, "a shard that holds none of the ids gives 0, whatever its rows hold"),
}


def _embed_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _SHARDS):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        vocab, start, total, why = _SHARDS[name]
        ids = rng.integers(0, total, 9).astype(np.int32)
        if start < total:
            ids[:4] = start, start + vocab - 1, max(start - 1, 0), min(start + vocab, total - 1)
        table = rng.standard_normal((vocab, 12)) if start < total else np.full((vocab, 12), np.nan)
        scale = 16.0 if name.startswith("scaled") else 1.0
        problem = EmbedProblem(dtype=dtype, vocab=vocab, width=12, rows=9, scale=scale)
        yield Case(case_id, problem, (ids, WeightArg(table, "embed"), np.array([start], np.int32)), why=why)


def _fuzz_embed(rng: np.random.Generator, n: int) -> Case:
    pick = np.random.default_rng([n, 4])
    dtype = str(pick.choice(FUZZ_DTYPES))
    vocab, width, rows = (int(size) for size in 2 ** pick.uniform(0, (8, 8, 6)))
    problem = EmbedProblem(dtype=dtype, vocab=vocab, width=width, rows=rows)
    start = int(rng.integers(0, 2 * vocab))
    ids = rng.integers(0, 4 * vocab, rows).astype(np.int32)
    table = WeightArg(rng.standard_normal((vocab, width)), "embed")
    return Case(f"fuzz/{n}-{short(dtype)}", problem, (ids, table, np.array([start], np.int32)))


_GATHERS = {
    "t7-r3": "", "t5-r9": "rows repeat and come in any order", "t1-r4": "",
    "padding-t9-r6": "rows of padding tokens may be NaN; logit rows are padded with 0",
}  # fmt: skip


def _gather_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _GATHERS):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        tokens, rows = (int(part[1:]) for part in name.split("-")[-2:])
        live = tokens - 4 if name.startswith("padding") else tokens
        index = rng.integers(0, live, rows).astype(np.int32)
        index[0], index[-1] = live - 1, 0  # padding rows ask for row 0
        x = rng.standard_normal((tokens, 10))
        x[live:] = np.nan
        yield Case(case_id, PointwiseProblem(dtype=dtype, rows=rows, width=10), (x, index), why=_GATHERS[name])


def _fuzz_gather(rng: np.random.Generator, n: int) -> Case:
    pick = np.random.default_rng([n, 5])
    dtype = str(pick.choice(FUZZ_DTYPES))
    tokens, rows, width = (int(size) for size in 2 ** pick.uniform(0, (7, 6, 8)))
    index = rng.integers(0, tokens, rows).astype(np.int32)
    problem = PointwiseProblem(dtype=dtype, rows=rows, width=width)
    return Case(f"fuzz/{n}-{short(dtype)}", problem, (rng.standard_normal((tokens, width)), index))


def _merge_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    sources = {
        "mixed": [-1, 2, 0, -1, 1, -1],
        "none": [-1] * 6,
        "all": [2, 1, 0, 2, 1, 0],
        "nan": [-1, 2, 2, -1, 1, -1],
    }
    for name, dtype in variants(size, sources):
        case_id = f"{name}-{short(dtype)}"
        rng, source = draw(case_id), np.array(sources[name], np.int32)
        x, embeds = rng.standard_normal((6, 10)), rng.standard_normal((3, 10))
        if name == "nan":
            x[source >= 0], embeds[0] = np.nan, np.nan
        why = (
            "what is not chosen does not leak, not even as 0 * NaN" if name == "nan" else "source -1 keeps the row of x"
        )
        yield Case(case_id, PointwiseProblem(dtype=dtype, rows=6, width=10), (x, embeds, source), why=why)
