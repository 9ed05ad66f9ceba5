"""Rotary position embeddings: the op, and the frequencies that kernels may tabulate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import FUZZ_DTYPES, seeded, short, variants
from lineshaft_contract.ops.checks import base_problem, expect, refuse
from lineshaft_contract.ops.spec import EXACT, Case, HostArray, Numerics, OpSpec, Size
from lineshaft_contract.problems import RopeProblem, RopeScaling, itemsize

Pair = tuple[HostArray, HostArray]


def specs() -> tuple[OpSpec, ...]:
    return (
        OpSpec(
            name="rope",
            signature="rope(q [T, Hq, D], k [T, Hk, D], positions int32[T]) -> (q, k)",
            problem=RopeProblem,
            specialise=lambda base, call: specialise_rope("rope", base, *call.args),
            infer=lambda p, call: (call.spec(0), call.spec(1)),
            reference=rope,
            cases=_cases,
            fuzz=_fuzz,
            flops=lambda p: 3 * p.rows * (p.q_heads + p.kv_heads) * p.dim,
            moved=lambda p: 2 * p.rows * (p.q_heads + p.kv_heads) * p.head_dim * itemsize(p.dtype),
        ),
    )


# ---- reference -------------------------------------------------------------------------------------------------


def rope(problem: RopeProblem, q: HostArray, k: HostArray, positions: HostArray, *, num: Numerics = EXACT) -> Pair:
    """Rotate the first `dim` values of each head by position * frequency (Su et al., 2021); the rest pass unchanged.

    Value i is paired with i + dim / 2, or 2i with 2i + 1 if `interleaved`. Cosines and sines are multiplied by
    `attention_factor`. Frequencies are made in float64 and rounded to the accumulation dtype, in which angles are
    computed: float32, and float64 for the exact run.
    """
    frequencies = num.load(rope_frequencies(problem))
    angles = num.load(positions)[:, None, None] * frequencies
    cos, sin = problem.attention_factor * np.cos(angles), problem.attention_factor * np.sin(angles)
    return _rotate(problem, q, cos, sin, num), _rotate(problem, k, cos, sin, num)


def _rotate(problem: RopeProblem, x: HostArray, cos: HostArray, sin: HostArray, num: Numerics) -> HostArray:
    out = np.array(num.load(x))
    half = problem.dim // 2
    first, second = (
        (slice(0, problem.dim, 2), slice(1, problem.dim, 2))
        if problem.interleaved
        else (slice(0, half), slice(half, problem.dim))
    )
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return num.save(out)


def rope_frequencies(problem: RopeProblem) -> HostArray:
    """float64[dim / 2]: radians per position, after scaling and division by `freq_factors`.

    Raises ContractViolation for an unknown kind of scaling or a wrong number of factors.
    """
    scaling = problem.scaling
    frequencies: HostArray = problem.base ** (-np.arange(0, problem.dim, 2, dtype=np.float64) / problem.dim)
    if scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies = _yarn(frequencies, problem)
    elif scaling.kind != "none":
        refuse("rope", f"scaling {scaling.kind!r}", "none, linear, llama3 or yarn")
    if not scaling.freq_factors:
        return frequencies
    if len(scaling.freq_factors) != problem.dim // 2:
        refuse("rope", f"{len(scaling.freq_factors)} freq_factors", f"one per pair, {problem.dim // 2}")
    divided: HostArray = frequencies / np.array(scaling.freq_factors)
    return divided


def _llama3(frequencies: HostArray, scaling: RopeScaling) -> HostArray:
    """Blend frequency / factor and frequency by how often the wave turns within the original context."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    out: HostArray = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return out


def _yarn(frequencies: HostArray, problem: RopeProblem) -> HostArray:
    """Blend frequency / factor and frequency by the number of the pair, between those of `beta_fast` and `beta_slow`
    turns within the original context."""
    scaling, last = problem.scaling, problem.dim - 1
    if scaling.original_context < 1 or problem.base <= 1:
        refuse("rope", f"yarn over a context of {scaling.original_context} at base {problem.base:g}", "both above 1")

    def pair(turns: float) -> float:
        length = scaling.original_context / (turns * 2 * math.pi)
        return problem.dim * math.log(length) / (2 * math.log(problem.base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, last)
    ramp = (np.arange(len(frequencies)) - low) / (high - low if high != low else 0.001)
    shrink = np.clip(ramp, 0.0, 1.0)
    out: HostArray = shrink * frequencies / scaling.factor + (1 - shrink) * frequencies
    return out


# ---- shapes ----------------------------------------------------------------------------------------------------


def specialise_rope(op: str, base: Any, q: Any, k: Any, positions: Any) -> RopeProblem:
    """The declared problem with the sizes of abstract q, k and positions; raises ContractViolation."""
    problem = base_problem(op, base, RopeProblem)
    rows, heads, dim = expect(op, "q", q, (None, None, None), problem.dtype).shape
    k = expect(op, "k", k, (rows, None, dim), problem.dtype)
    expect(op, "positions", positions, (rows,), "int32")
    if problem.dim % 2 or not 0 < problem.dim <= dim:
        refuse(op, f"dim {problem.dim} of heads of {dim}", "an even dim within the head")
    return replace(problem, rows=rows, q_heads=heads, kv_heads=k.shape[1], head_dim=dim)


# ---- cases -----------------------------------------------------------------------------------------------------

_LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
_YARN = RopeScaling(kind="yarn", factor=8.0, original_context=64)
_SMOOTH = RopeScaling(kind="yarn", factor=8.0, original_context=64, beta_fast=16.0, beta_slow=2.0, truncate=False)
_FACTORS = RopeScaling(freq_factors=(1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0))
_VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "neox-d16": ({"dim": 16}, "halves of a head turn against each other"),
    "neox-d64-long": (
        {"dim": 64, "max_position": 131072, "base": 500000.0}, "angles and positions are float32, not bfloat16",
    ),
    "unsorted-d16": ({"dim": 16}, "positions come in any order and repeat"),
    "partial-d8of16": ({"dim": 8, "head_dim": 16}, "values beyond dim pass unchanged"),
    "interleaved-d16": ({"dim": 16, "interleaved": True}, "value 2i turns with 2i + 1"),
    "linear-d16": ({"dim": 16, "scaling": RopeScaling(kind="linear", factor=4.0)}, ""),
    "llama3-d32": ({"dim": 32, "max_position": 512, "scaling": _LLAMA3}, ""),
    "freq_factors-d16": ({"dim": 16, "scaling": _FACTORS}, "factors divide the frequencies"),
    "yarn-d32": ({"dim": 32, "max_position": 512, "scaling": _YARN, "attention_factor": 1.25}, "the rotated grow"),
    "yarn_smooth-d32": ({"dim": 32, "max_position": 512, "scaling": _SMOOTH}, "bounds are not whole pairs"),
    "grown-partial-d8of16": (
        {"dim": 8, "head_dim": 16, "attention_factor": 1.5}, "values beyond dim pass unchanged, and do not grow",
    ),
    "interleaved-partial-d6of10": ({"dim": 6, "head_dim": 10, "interleaved": True}, ""),
}  # fmt: skip


def _cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _VARIANTS):
        case_id = f"{name}-{short(dtype)}"
        own, why = _VARIANTS[name]
        fields = {"base": 10000.0, "max_position": 256, "head_dim": own["dim"], **own}
        problem = RopeProblem(dtype=dtype, rows=5, q_heads=4, kv_heads=2, **fields)
        yield _case(case_id, draw(case_id), problem, why)


def _case(case_id: str, rng: np.random.Generator, problem: RopeProblem, why: str = "") -> Case:
    positions = np.sort(rng.integers(0, problem.max_position, problem.rows)).astype(np.int32)
    positions[0], positions[-1] = 0, problem.max_position - 1
    if case_id.startswith("unsorted"):
        positions = positions[[3, 0, 4, 3, 1]]
    q, k = (
        rng.standard_normal((problem.rows, heads, problem.head_dim)) for heads in (problem.q_heads, problem.kv_heads)
    )
    return Case(case_id, problem, (q, k, positions), why=why)


def _fuzz(rng: np.random.Generator, n: int) -> Case:
    pick = np.random.default_rng([n, 3])
    dtype, half = str(pick.choice(FUZZ_DTYPES)), int(pick.integers(1, 65))
    kv_heads = int(pick.integers(1, 5))
    problem = RopeProblem(
        dtype=dtype, dim=2 * half, head_dim=2 * half + int(pick.choice([0, 6])), base=float(pick.choice([1e4, 5e5])),
        rows=int(pick.integers(1, 20)), q_heads=kv_heads * int(pick.integers(1, 5)), kv_heads=kv_heads,
        max_position=int(2 ** pick.uniform(0, 17)), interleaved=bool(pick.random() < 0.3),
    )  # fmt: skip
    return _case(f"fuzz/{n}-{short(dtype)}", rng, problem)
