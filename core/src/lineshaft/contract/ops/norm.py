"""RMS norm, alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft.contract.ops.cases import seeded, short, variants
from lineshaft.contract.ops.checks import array_spec, expect, matrix_rows, refuse, weight_problem
from lineshaft.contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance, WeightArg
from lineshaft.contract.problems import NormProblem, itemsize

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

_SMOKE = ("t1-w64", "t5-w33", "heads-t3-w16", "zero_row-t3-w32")
_FULL = ("t65-w1024",)


def _norm_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    return _cases(rng, size, residual=False)


def _add_norm_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    return _cases(rng, size, residual=True)


def _cases(rng: np.random.Generator, size: Size, residual: bool) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _SMOKE, _FULL):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        rows, width = (int(part[1:]) for part in name.split("-")[-2:])
        shape = (rows, 2, width) if name.startswith("heads") else (rows, width)
        x, r = rng.standard_normal((2, *shape))
        if name.startswith("zero_row"):
            x[1] = r[1] = 0.0  # eps alone keeps the row finite
        problem = NormProblem(dtype=dtype, width=width, eps=1e-5, rows=x.size // width)
        w = WeightArg(1 + 0.1 * rng.standard_normal(width), "norm")
        yield Case(case_id, problem, (x, r, w) if residual else (x, w))
