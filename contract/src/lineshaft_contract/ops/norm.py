"""RMS norm, alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import FUZZ_DTYPES, seeded, short, variants
from lineshaft_contract.ops.checks import array_spec, expect, matrix_rows, refuse, weight_problem
from lineshaft_contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance, WeightArg
from lineshaft_contract.problems import NormProblem, itemsize

Pair = tuple[HostArray, HostArray]


def specs() -> tuple[OpSpec, ...]:
    return (
        OpSpec(
            name="rms_norm",
            signature="rms_norm(x [..., W], w [W]) -> [..., W]; eps in the problem",
            problem=NormProblem,
            specialise=lambda base, call: _specialise("rms_norm", base, call, call.args[1]),
            infer=lambda p, call: call.spec(0),
            reference=rms_norm,
            cases=_norm_cases,
            fuzz=lambda rng, n: _fuzz(rng, n, residual=False),
            tolerance=Tolerance(depth=lambda p: p.width),
            weight="norm",
            flops=lambda p: 4 * p.rows * p.width,
            moved=lambda p: (2 * p.rows + 1) * p.width * itemsize(p.dtype),
        ),
        OpSpec(
            name="add_rms_norm",
            signature="add_rms_norm(x [..., W], r [..., W], w [W]) -> (rms_norm(x + r, w), x + r)",
            problem=NormProblem,
            specialise=_specialise_add_norm,
            infer=lambda p, call: (call.spec(0), call.spec(0)),
            reference=add_rms_norm,
            cases=_add_norm_cases,
            fuzz=lambda rng, n: _fuzz(rng, n, residual=True),
            tolerance=Tolerance(depth=lambda p: p.width),
            required=False,
            weight="norm",
            default=_add_then_norm,
            flops=lambda p: 5 * p.rows * p.width,
            moved=lambda p: (4 * p.rows + 1) * p.width * itemsize(p.dtype),
        ),
    )


# ---- references ------------------------------------------------------------------------------------------------


def rms_norm(problem: NormProblem, x: HostArray, w: HostArray, *, num: Numerics = EXACT) -> HostArray:
    """x [..., W], w [W] -> x / sqrt(mean(x^2) + eps) * w, rounded once (Zhang and Sennrich, 2019)."""
    values = num.load(x)
    scale = np.sqrt(np.mean(values * values, axis=-1, keepdims=True) + problem.eps)
    return num.save(values / scale * num.load(w))


def add_rms_norm(problem: NormProblem, x: HostArray, r: HostArray, w: HostArray, *, num: Numerics = EXACT) -> Pair:
    """(rms_norm(x + r, w), x + r); the sum is rounded before it is normed, as the default decomposition does."""
    total = num.save(num.load(x) + num.load(r))
    return rms_norm(problem, total, w, num=num), total


def _add_then_norm(ops: Any, problem: NormProblem, x: Any, r: Any, w: Any) -> tuple[Any, Any]:
    total = ops.add(x, r)
    return ops.rms_norm(total, w), total


# ---- shapes ----------------------------------------------------------------------------------------------------


def _specialise(op: str, base: Any, call: Call, weight: Any) -> NormProblem:
    problem = weight_problem(op, base, weight, "norm", NormProblem)
    x = array_spec(op, "x", call.args[0])
    if x.shape[-1:] != (problem.width,) or x.dtype != problem.dtype:
        refuse(op, f"x {x.dtype}{list(x.shape)}", f"{problem.dtype}[..., {problem.width}]")
    return replace(problem, rows=matrix_rows(x))


def _specialise_add_norm(base: Any, call: Call) -> NormProblem:
    problem = _specialise("add_rms_norm", base, call, call.args[2])
    expect("add_rms_norm", "r", call.args[1], call.spec(0).shape, problem.dtype)
    return problem


# ---- cases -----------------------------------------------------------------------------------------------------

_NORMS = {
    "t1-w64": "", "t300-w32": "",
    "t5-w33": "", "heads-t3-w16": "", "zero_row-t3-w32": "eps keeps a row of zeros finite",
    "small-t3-w32": "eps is the problem's, and inside the root",
    "nan_row-t3-w32": "NaN of a padding row stays in its row",
    "t65-w1024": "", "sums-t2-w1536": "squares are summed in float32: bfloat16 stops growing after 256 of them",
}  # fmt: skip
_FULL = ("t65-w1024",)
_SUMS = "sums-t2-w1536"
_SINGLE = ((_SUMS, "bfloat16"), ("t2-w4160", "float32"))


def _norm_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    return _cases(rng, size, residual=False)


def _add_norm_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    return _cases(rng, size, residual=True)


def _cases(rng: np.random.Generator, size: Size, residual: bool) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in [*variants(size, [n for n in _NORMS if n not in (*_FULL, _SUMS)], _FULL), *_SINGLE]:
        case_id = f"{name}-{short(dtype)}"
        rows, width = (int(part[1:]) for part in name.split("-")[-2:])
        problem = NormProblem(dtype=dtype, width=width, eps=1e-2 if name.startswith("small") else 1e-5, rows=rows)
        yield _case(case_id, draw(case_id), problem, residual)


def _case(case_id: str, rng: np.random.Generator, problem: NormProblem, residual: bool) -> Case:
    shape: tuple[int, ...] = (problem.rows, problem.width)
    if case_id.startswith("heads"):
        shape, problem = (problem.rows, 2, problem.width), replace(problem, rows=2 * problem.rows)
    x, r = rng.standard_normal((2, *shape)) * (0.1 if case_id.startswith("small") else 1.0)
    if case_id.startswith(("zero_row", "nan_row")):
        x[1] = r[1] = 0.0 if case_id.startswith("zero") else np.nan
    if case_id.startswith("sums"):
        x = np.sign(x) * (1 - 0.02 * np.abs(x))
        r = 0.001 * r
    w = WeightArg(1 + 0.1 * rng.standard_normal(problem.width), "norm")
    why = _NORMS.get(case_id.rpartition("-")[0], "")
    return Case(case_id, problem, (x, r, w) if residual else (x, w), why=why)


def _fuzz(rng: np.random.Generator, n: int, residual: bool) -> Case:
    pick = np.random.default_rng([n, 2])
    dtype = str(pick.choice(FUZZ_DTYPES))
    rows, width = (int(size) for size in 2 ** pick.uniform(0, (6, 11)))
    problem = NormProblem(dtype=dtype, width=width, eps=float(10 ** -pick.uniform(3, 7)), rows=rows)
    return _case(f"fuzz/{n}-{short(dtype)}", rng, problem, residual)
