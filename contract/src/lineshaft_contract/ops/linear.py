"""Products with weights: `linear` and, per head, `head_linear`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from lineshaft_contract.ops.cases import FUZZ_DTYPES, seeded, short, variants
from lineshaft_contract.ops.checks import expect, refuse, weight_problem
from lineshaft_contract.ops.quantize import (
    ACTIVATION_SCHEMES,
    BLOCK,
    BLOCK_SCHEMES,
    INT4,
    LINEAR_SCHEMES,
    NONE,
    WEIGHT_SCHEMES,
    block_parts,
    check_scheme,
    quantize_blocks,
    quantize_groups,
    quantize_rows,
    quantized_bytes,
)
from lineshaft_contract.ops.spec import EXACT, Call, Case, HostArray, Numerics, OpSpec, Size, Tolerance, WeightArg
from lineshaft_contract.problems import LinearProblem, itemsize
from lineshaft_contract.steps import ArraySpec


def specs() -> tuple[OpSpec, ...]:
    return (
        OpSpec(
            name="linear",
            signature="linear(x [T, I], w [O, I], *, bias [O], adapters) -> [T, O]",
            problem=LinearProblem,
            specialise=_specialise_linear,
            infer=lambda p, call: ArraySpec((p.m, p.n), p.dtype),
            reference=linear,
            cases=_linear_cases,
            tolerance=Tolerance(depth=lambda p: p.k),
            weight="linear",
            optional={"bias": "bias", "adapters": "adapters"},
            fuzz=_fuzz,
            flops=_flops,
            moved=_moved,
        ),
        OpSpec(
            name="head_linear",
            signature="head_linear(x [T, H, I], w [H, O, I]) -> [T, H, O]",
            problem=LinearProblem,
            specialise=_specialise_heads,
            infer=lambda p, call: ArraySpec((p.m, p.heads, p.n), p.dtype),
            reference=head_linear,
            cases=_head_cases,
            tolerance=Tolerance(depth=lambda p: p.k),
            required=False,
            weight="linear",
            flops=_flops,
            moved=_moved,
        ),
    )


# ---- references ------------------------------------------------------------------------------------------------


def linear(
    problem: LinearProblem,
    x: HostArray,
    w: HostArray,
    *,
    num: Numerics = EXACT,
    bias: HostArray | None = None,
    adapters: Any = None,
) -> HostArray:
    """x [T, I], w [O, I], bias [O] -> x w^T + bias [T, O], rounded once; w, and x where the scheme says so, quantized.

    Codes and scales are those of `quantize_rows`, or of `quantize_groups` for "int4"; for a scheme of blocks those that
    the checkpoint stores, or of `quantize_blocks`. Where x is quantized, products of codes are summed before any scale
    is applied.
    """
    if adapters is not None:
        refuse("linear", "adapters=", "none: adapters are reserved")
    out = _product(problem, x, w, num)
    return num.save(out if bias is None else out + num.load(bias))


def _product(problem: LinearProblem, x: HostArray, w: HostArray, num: Numerics) -> HostArray:
    """x [T, I], w [O, I] -> their product [T, O] in the accumulation dtype."""
    if problem.scheme == NONE:
        codes, scale = w, None
    elif problem.scheme == INT4:
        codes, scales = quantize_groups(w, problem.group_size)
        codes, scale = num.load(codes) * num.load(scales).repeat(problem.group_size, axis=1), None
    elif problem.scheme in BLOCK_SCHEMES:
        codes, scales, *offset = block_parts(quantize_blocks(w, problem.scheme), problem.scheme)
        codes, scale = num.load(codes) * num.load(scales).repeat(BLOCK, axis=1), None
        codes = codes + num.load(offset[0]).repeat(BLOCK, axis=1) if offset else codes
    else:
        codes, scale = quantize_rows(w, problem.scheme)
    given, tokens = quantize_rows(x, problem.scheme) if problem.scheme in ACTIVATION_SCHEMES else (x, None)
    out: HostArray = num.load(given) @ num.load(codes).T
    out = out if tokens is None else out * num.load(tokens)[:, None]
    return out if scale is None else out * num.load(scale)


def head_linear(problem: LinearProblem, x: HostArray, w: HostArray, *, num: Numerics = EXACT) -> HostArray:
    """x [T, H, I], w [H, O, I] -> [T, H, O]: head h of x times w[h]^T."""
    out = np.matmul(num.load(x).transpose(1, 0, 2), num.load(w).transpose(0, 2, 1))
    return num.save(out.transpose(1, 0, 2))


# ---- shapes ----------------------------------------------------------------------------------------------------


def _specialise_linear(base: Any, call: Call) -> LinearProblem:
    problem = weight_problem("linear", base, call.args[1], "linear", LinearProblem)
    check_scheme("linear", problem)
    x = expect("linear", "x", call.args[0], (None, problem.k), problem.dtype)
    if call.kwargs.get("bias") is not None:
        expect("linear", "bias", call.kwargs["bias"], (problem.n,))
    return replace(problem, m=x.shape[0])


def _specialise_heads(base: Any, call: Call) -> LinearProblem:
    problem = weight_problem("head_linear", base, call.args[1], "linear", LinearProblem)
    if problem.scheme != NONE:
        refuse("head_linear", f"scheme {problem.scheme!r}", f"{NONE}: weights of a product per head are not quantized")
    x = expect("head_linear", "x", call.args[0], (None, problem.heads, problem.k), problem.dtype)
    return replace(problem, m=x.shape[0])


def _flops(p: LinearProblem) -> int:
    return 2 * p.m * p.n * p.k * max(p.heads, 1)


def _moved(p: LinearProblem) -> int:
    plain = p.scheme == NONE
    weight = p.n * p.k * itemsize(p.dtype) if plain else quantized_bytes(p.n, p.k, p.group_size, p.scheme)
    return ((p.m * p.k + p.m * p.n) * itemsize(p.dtype) + weight) * max(p.heads, 1)


# ---- cases -----------------------------------------------------------------------------------------------------

_SIZES = {
    "decode/m1-n48-k32": (1, 48, 32), "decode/m3-n33-k67": (3, 33, 67), "prefill/m17-n64-k96": (17, 64, 96),
    "bias/m3-n33-k67": (3, 33, 67), "nan_row/m3-n33-k67": (3, 33, 67), "one/m1-n1-k1": (1, 1, 1),
    "decode/m2-n4160-k32": (2, 4160, 32), "prefill/m520-n64-k32": (520, 64, 32),
    "prefill/m1030-n80-k48": (1030, 80, 48),
    "decode/m8-n256-k512": (8, 256, 512), "prefill/m130-n192-k1024": (130, 192, 1024),
}  # fmt: skip
_FULL = ("decode/m8-n256-k512", "prefill/m130-n192-k1024")
_SUMS = "sums/m3-n40-k512"
_DEEP = "decode/m2-n32-k4352"
"""In float32 alone: over so many terms a bfloat16 result may be off by its own size."""
_SINGLE = ((_SUMS, "bfloat16"), (_DEEP, "float32"))
_QUANTIZED = (
    "decode/m1-n128-k256", "decode/m3-n33-k67", "prefill/m17-n256-k128", "bias/m3-n33-k67", "zero_row/m2-n5-k64",
    "outlier/m3-n33-k67", "nan_weight/m2-n5-k64", "prefill/m130-n72-k160",
)  # fmt: skip
"""Of each scheme, whose name they begin with."""
_QUANTIZED_FULL = ("decode/m8-n512-k1024", "prefill/m130-n384-k1024")
_ACTIVATED = (
    "nan_row/m3-n33-k67", "zero_token/m3-n33-k67", "outlier_token/m3-n33-k67", "halves/m2-n5-k64",
    "decode/m2-n8-k1100", "nan_token/m64-n33-k96",
)  # fmt: skip
"""Of each scheme that quantizes activations, besides."""
_GROUPED = (
    "decode/m1-n128-k256-g128", "decode/m3-n33-k96-g32", "prefill/m17-n256-k128-g64", "bias/m3-n33-k96-g32",
    "zero_row/m2-n5-k64-g32", "outlier/m3-n33-k96-g32", "nan_weight/m2-n5-k64-g32", "decode/m2-n6-k30-g6",
    "prefill/m130-n72-k160-g32",
)  # fmt: skip
_GROUPED_FULL = ("decode/m8-n512-k1024-g128", "prefill/m130-n384-k1024-g64")
_BLOCKS = (
    "decode/m1-n128-k256", "decode/m3-n33-k96", "prefill/m17-n256-k128", "bias/m3-n33-k96", "zero_row/m2-n5-k64",
    "outlier/m3-n33-k96", "nan_row/m3-n33-k96", "decode/m2-n6-k32", "prefill/m130-n72-k160",
)  # fmt: skip
_BLOCKS_FULL = ("decode/m8-n512-k1024", "prefill/m130-n384-k1024")
_WHY = {
    "bias": "the bias is added before the one rounding", "nan_row": "NaN of a padding row stays in its row",
    "sums": "sums are made in float32: products that cancel", "zero_row": "zeros have the scale 1",
    "outlier": "one large weight coarsens its own row or group alone",
    "nan_weight": "NaN and infinite weights show in all results of their row",
    "zero_token": "a token of zeros has the scale 1", "outlier_token": "one large activation coarsens its token alone",
    "nan_token": "one NaN or infinity makes all results of its token NaN, and those of no other",
    "halves": "codes of activations are rounded to the nearest, halves to even",
}  # fmt: skip


def _linear_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    for name, dtype in [*variants(size, [n for n in _SIZES if n not in _FULL], _FULL), *_SINGLE]:
        case_id = f"{name}-{short(dtype)}"
        kind, _, sizes = name.partition("/")
        yield _linear_case(case_id, draw(case_id), _problem(sizes, dtype, kind), kind)
    for scheme in (*LINEAR_SCHEMES, *BLOCK_SCHEMES):
        smoke, full = (_GROUPED, _GROUPED_FULL) if scheme == INT4 else (_QUANTIZED, _QUANTIZED_FULL)
        smoke, full = (_BLOCKS, _BLOCKS_FULL) if scheme in BLOCK_SCHEMES else (smoke, full)
        for name, dtype in variants(size, [*smoke, *(_ACTIVATED if scheme in ACTIVATION_SCHEMES else ())], full):
            case_id = f"{scheme}_{name}-{short(dtype)}"
            kind, _, sizes = name.partition("/")
            yield _linear_case(case_id, draw(case_id), _problem(sizes, dtype, kind, scheme), kind)


def _problem(sizes: str, dtype: str, kind: str, scheme: str = NONE) -> LinearProblem:
    m, n, k, group = (*(int(part[1:]) for part in sizes.split("-")), 0)[:4]
    return LinearProblem(dtype=dtype, m=m, n=n, k=k, bias=kind == "bias", scheme=scheme, group_size=group)


def _linear_case(case_id: str, rng: np.random.Generator, problem: LinearProblem, kind: str = "") -> Case:
    x, w = rng.standard_normal((problem.m, problem.k)), rng.standard_normal((problem.n, problem.k)) / problem.k**0.5
    if kind == "nan_row":
        x[1] = np.nan
    if kind == "sums":
        cancel(x, w)
    if problem.scheme != NONE:
        _uneven(rng, w, kind)
    if problem.scheme in ACTIVATION_SCHEMES:
        _uneven_tokens(rng, x, kind)
    kwargs = {"bias": rng.standard_normal(problem.n)} if problem.bias else {}
    return Case(case_id, problem, (x, WeightArg(w, "linear")), kwargs, _WHY.get(kind, ""))


def _fuzz(rng: np.random.Generator, n: int) -> Case:
    pick = np.random.default_rng([n, 1])
    dtype = str(pick.choice(FUZZ_DTYPES))
    m, out, k = (int(size) for size in 2 ** pick.uniform(0, (6, 8, 10)))
    bias, scheme = bool(pick.random() < 0.2), str(pick.choice((NONE, NONE, *WEIGHT_SCHEMES, *LINEAR_SCHEMES)))
    group = int(pick.choice((32, 64, 128))) if scheme == INT4 else 0
    k = -(-k // group) * group if group else k
    problem = LinearProblem(dtype=dtype, m=m, n=out, k=k, bias=bias, scheme=scheme, group_size=group)
    return _linear_case(f"fuzz/{n}-{short(dtype)}", rng, problem)


def _uneven(rng: np.random.Generator, w: HostArray, kind: str) -> None:
    """Give the rows of w [n, k] different sizes, so that none has the scale of another, and what `kind` is about."""
    w *= 2 ** rng.uniform(-2, 2, (len(w), 1))
    if kind == "zero_row":
        w[2] = 0
    if kind == "outlier":
        w[2, 5] = 40 * np.abs(w).max()
    if kind == "nan_weight":
        w[1, 7], w[3, 9] = np.nan, -np.inf


def _uneven_tokens(rng: np.random.Generator, x: HostArray, kind: str) -> None:
    """Give the rows of x [m, k] different sizes too, and what `kind` is about."""
    x *= 2 ** rng.uniform(-2, 2, (len(x), 1))
    if kind == "zero_token":
        x[1] = 0
    if kind == "nan_token":
        x[1, 5], x[2, 7] = np.nan, -np.inf
    if kind == "outlier_token":
        x[1, 5] = 40 * np.abs(x).max()
    if kind == "halves":  # a largest of 127 or 448 makes the scale 1
        x[:] = rng.integers(-30, 30, x.shape) + 0.5
        x[0, 0], x[1, 0] = 127, 448


def cancel(x: HostArray, w: HostArray) -> None:
    """Give x [..., k] and w [..., n, k] large terms over the first nine tenths of k, whose sum in x w^T is 0."""
    half = x.shape[-1] * 9 // 20
    x[..., :half], w[..., :half] = np.abs(x[..., :half]) + 1, np.abs(w[..., :half]) * x.shape[-1] ** 0.5 + 1
    x[..., half : 2 * half], w[..., half : 2 * half] = x[..., :half], -w[..., :half]


def _head_cases(rng: np.random.Generator, size: Size) -> Iterable[Case]:
    draw = seeded(rng)
    sizes = {
        "m1-h4-n16-k8": (1, 4, 16, 8), "m5-h3-n7-k24": (5, 3, 7, 24), "m20-h2-n24-k16": (20, 2, 24, 16),
        "m70-h2-n24-k16": (70, 2, 24, 16), "m64-h16-n128-k64": (64, 16, 128, 64),
    }  # fmt: skip
    sums = "sums-m3-h2-n7-k512"
    for name, dtype in [*variants(size, list(sizes)[:4], list(sizes)[4:]), (sums, "bfloat16")]:
        case_id = f"{name}-{short(dtype)}"
        rng = draw(case_id)
        m, heads, n, k = {**sizes, sums: (3, 2, 7, 512)}[name]
        problem = LinearProblem(dtype=dtype, m=m, n=n, k=k, heads=heads)
        x, w = rng.standard_normal((m, heads, k)), rng.standard_normal((heads, n, k)) / np.sqrt(k)
        if name == sums:
            cancel(x, w)
        yield Case(case_id, problem, (x, WeightArg(w, "linear")), why=_WHY["sums"] if name == sums else "")
