"""Row-wise arithmetic without weights: `concat`, `add`, `silu_mul`, `gelu_mul`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import seeded, short, variants
from lineshaft_contract.ops.checks import array_spec, expect, matrix_rows, refuse
from lineshaft_contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance
from lineshaft_contract.problems import PointwiseProblem, itemsize
from lineshaft_contract.steps import ArraySpec


def specs() -> tuple[OpSpec, ...]:
    return (_concat_spec(), _add_spec(), *(_gated_spec(name) for name in ("silu_mul", "gelu_mul")))


def _concat_spec() -> OpSpec:
    return OpSpec(
        name="concat",
        signature="concat(xs: list of arrays, dim) -> array; all dims but `dim` agree",
        problem=PointwiseProblem,
        specialise=_specialise_concat,
        infer=lambda p, call: _joined(call),
        reference=concat,
        cases=_concat_cases,
        tolerance=Tolerance(exact=True),
        moved=lambda p: 2 * p.rows * p.width * itemsize(p.dtype),
    )


def _add_spec() -> OpSpec:
    return OpSpec(
        name="add",
        signature="add(x [..., W], y [..., W]) -> [..., W]",
        problem=PointwiseProblem,
        specialise=_specialise_add,
        infer=lambda p, call: call.spec(0),
        reference=add,
        cases=_add_cases,
        flops=lambda p: p.rows * p.width,
        moved=lambda p: 3 * p.rows * p.width * itemsize(p.dtype),
    )


def _gated_spec(name: str) -> OpSpec:
    return OpSpec(
        name=name,
        signature=f"{name}(x [T, 2F]) -> [T, F]; the gate is the first half",
        problem=PointwiseProblem,
        specialise=lambda base, call: _specialise_gated(name, call),
        infer=lambda p, call: ArraySpec((p.rows, p.width), p.dtype),
        reference={"silu_mul": silu_mul, "gelu_mul": gelu_mul}[name],
        cases=_gated_cases,
        flops=lambda p: 6 * p.rows * p.width,
        moved=lambda p: 3 * p.rows * p.width * itemsize(p.dtype),
    )


# ---- references ------------------------------------------------------------------------------------------------


def concat(problem: PointwiseProblem, xs: Sequence[HostArray], dim: int, *, num: Numerics = EXACT) -> HostArray:
    """Arrays that agree in every dim but `dim`, joined along it."""
    return num.save(np.concatenate([num.load(x) for x in xs], axis=dim))


def add(problem: PointwiseProblem, x: HostArray, y: HostArray, *, num: Numerics = EXACT) -> HostArray:
    """x + y, of equal shapes."""
    return num.save(num.load(x) + num.load(y))


def silu_mul(problem: PointwiseProblem, x: HostArray, *, num: Numerics = EXACT) -> HostArray:
    """x [T, 2F] = (gate, up) -> gate / (1 + exp(-gate)) * up [T, F]."""
    return _gated(silu, x, num)


def gelu_mul(problem: PointwiseProblem, x: HostArray, *, num: Numerics = EXACT) -> HostArray:
    """x [T, 2F] = (gate, up) -> gelu(gate) * up [T, F], with the tanh approximation (Hendrycks and Gimpel, 2016)."""
    return _gated(gelu, x, num)


def _gated(activation: Callable[[HostArray], HostArray], x: HostArray, num: Numerics) -> HostArray:
    gate, up = np.split(num.load(x), 2, axis=-1)
    return num.save(activation(gate) * up)


def silu(x: HostArray) -> HostArray:
    """x / (1 + exp(-x)), with the limit 0 where exp overflows."""
    with np.errstate(over="ignore"):
        out: HostArray = x / (1 + np.exp(-x))
    return out


def gelu(x: HostArray) -> HostArray:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    out: HostArray = x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return out


# ---- shapes ----------------------------------------------------------------------------------------------------


def _joined(call: Call) -> ArraySpec:
    xs = [array_spec("concat", f"xs[{i}]", x) for i, x in enumerate(call.args[0])]
    dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    if not xs or type(dim) is not int or not 0 <= dim < len(xs[0].shape):
        refuse("concat", f"{len(xs)} arrays, dim {dim!r}", "one array or more and a dim of theirs, from 0")
    rest: list[int | None] = list(xs[0].shape)
    rest[dim] = None
    for i, x in enumerate(call.args[0]):
        expect("concat", f"xs[{i}]", x, rest, xs[0].dtype)
    shape = list(xs[0].shape)
    shape[dim] = sum(x.shape[dim] for x in xs)
    return ArraySpec(tuple(shape), xs[0].dtype)


def _specialise_concat(base: Any, call: Call) -> PointwiseProblem:
    out = _joined(call)
    return PointwiseProblem(dtype=out.dtype, rows=matrix_rows(out), width=out.shape[-1])


def _specialise_add(base: Any, call: Call) -> PointwiseProblem:
    x = array_spec("add", "x", call.args[0])
    expect("add", "y", call.args[1], x.shape, x.dtype)
    return PointwiseProblem(dtype=x.dtype, rows=matrix_rows(x), width=x.shape[-1])


def _specialise_gated(name: str, call: Call) -> PointwiseProblem:
    x = expect(name, "x", call.args[0], (None, None))
    if x.shape[1] % 2:
        refuse(name, f"x {list(x.shape)}", "an even last dim: gate and up")
    return PointwiseProblem(dtype=x.dtype, rows=x.shape[0], width=x.shape[1] // 2)


# ---- cases -----------------------------------------------------------------------------------------------------


def _concat_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    sizes: dict[str, tuple[int, list[tuple[int, ...]]]] = {
        "dim0": (0, [(2, 5), (3, 5)]), "dim1-three": (1, [(4, 2), (4, 1), (4, 6)]), "dim2": (2, [(2, 3, 4), (2, 3, 2)]),
    }  # fmt: skip
    for name, dtype in variants(size, sizes):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        dim, shapes = sizes[name]
        out = list(shapes[0])
        out[dim] = sum(shape[dim] for shape in shapes)
        problem = PointwiseProblem(dtype=dtype, rows=math.prod(out[:-1]), width=out[-1])
        yield Case(case_id, problem, ([rng.standard_normal(shape) for shape in shapes], dim))


def _add_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, ["t1-w33", "t7-w64"], ["t129-w1000"]):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        rows, width = (int(part[1:]) for part in name.split("-"))
        x, y = rng.standard_normal((2, rows, width))
        yield Case(case_id, PointwiseProblem(dtype=dtype, rows=rows, width=width), (x, y))


_GATED = {
    "t1-f5": "the gate is the first half", "t6-f32": "the gate is the first half",
    "t2-f8200": "", "t300-f8": "", "t3-f8-large": "exp of a very negative gate overflows, the result is 0",
    "t3-f8-nan_row": "NaN of a padding row stays in its row",
}  # fmt: skip


def _gated_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in variants(size, _GATED, ["t65-f512"]):
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        rows, width = (int(part[1:]) for part in name.split("-")[:2])
        spread = 100.0 if name.endswith("large") else 2.0  # exp(-gate) overflows float32 below -88
        x = rng.standard_normal((rows, 2 * width)) * spread
        if name.endswith("nan_row"):
            x[1] = np.nan
        yield Case(case_id, PointwiseProblem(dtype=dtype, rows=rows, width=width), (x,), why=_GATED.get(name, ""))
