"""Products with weights beyond the cases of the contract: the tiles of each target, sums in parts, rows that are not
dense, codes to the bit, and which kernel takes what and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import Case, all_ops
from lineshaft_contract.ops.quantize import LINEAR_SCHEMES, fnuz_codes, quantize_rows
from lineshaft_contract.ops.run import compare, operand
from lineshaft_contract.ops.spec import WeightArg
from lineshaft_contract.problems import LinearProblem
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_torch.arrays import from_host, to_host
from lineshaft_triton.interpreting import compiling
from lineshaft_triton.kernels import triton_kernels
from lineshaft_triton.kernels.linear import readable
from lineshaft_triton.kernels.linear_configs import CODE_TIERS, EXPERT_TIERS, TABLES, TIERS, table_of
from lineshaft_triton.kernels.quant import codes_of, quantized
from lineshaft_triton.priority import TRITON
from lineshaft_triton.targets import FN, FNUZ, TARGETS

SPECS = all_ops()
SESSION = SimpleNamespace(recorder=None)
SCHEMES = ("none", *LINEAR_SCHEMES)
WITHOUT_FP8 = ("sm80", "gfx90a", "gfx1100")


@pytest.fixture
def real_tiles() -> Iterator[None]:
    """Kernels take the tiles of their target, not those of the interpreter."""
    with compiling():
        yield


def kernels_of(target: str, op: str = "linear") -> list[Kernel]:
    return [made for made in triton_kernels("gpu", TARGETS[target]) if made.op == op and "_linear" in made.name]


def taking(target: str, problem: LinearProblem, op: str = "linear") -> list[Kernel]:
    """The kernels that take a problem, best first."""
    found = [k for k in kernels_of(target, op) if problem.features() <= k.handles and k.supports(problem) is None]
    return sorted(found, key=lambda kernel: -kernel.priority)


def problem_of(m: int, n: int, k: int, scheme: str = "none", dtype: str = "bfloat16", **fields: Any) -> LinearProblem:
    group = 32 if scheme == "int4" else 0
    return LinearProblem(dtype=dtype, m=m, n=n, k=k, scheme=scheme, **{"group_size": group, **fields})


def case_of(problem: LinearProblem, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    heads = (problem.heads,) if problem.heads else ()
    x = rng.standard_normal((problem.m, *heads, problem.k))
    w = rng.standard_normal((*heads, problem.n, problem.k)) / problem.k**0.5
    kwargs = {"bias": rng.standard_normal(problem.n)} if problem.bias else {}
    return Case("random", problem, (x, WeightArg(w, "linear")), kwargs)


def weight_of(kernel: Kernel, problem: LinearProblem, host: Any) -> Any:
    """What a session makes of a weight for a kernel."""
    if kernel.pack is None:
        return from_host(host)
    param = Param("w", "w", host.shape, host.dtype.name, {"linear": problem}, lambda *_: Local(()))
    leaves = kernel.pack(param, Local((Stored("none", host.shape, {"data": host}),)))
    return SimpleNamespace(arrays={name: from_host(array) for name, array in leaves.items()})


def result_of(kernel: Kernel, case: Case, x: torch.Tensor | None = None) -> torch.Tensor:
    """What a kernel gives for a case, of `x` in the place of the case's where it is given."""
    hosts = [operand(value, case.problem) for value in case.args]
    kwargs = {name: from_host(operand(value, case.problem)) for name, value in case.kwargs.items()}
    assert isinstance(case.problem, LinearProblem)
    w = weight_of(kernel, case.problem, hosts[1])
    found = kernel.bind(case.problem, SESSION)(from_host(hosts[0]) if x is None else x, w, **kwargs)
    assert isinstance(found, torch.Tensor)
    return found


def launches_of(kernel: Kernel, problem: LinearProblem) -> dict[str, tuple[tuple[int, ...], str]]:
    """The grid of each launch, and the instructions that it expects, by the kernel's name; nothing runs."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def launcher(made: Any, grid: Any, config: Any, args: Any, constexprs: Any, expects: str) -> None:
        found[made.__name__] = grid, expects

    w = weight_of(kernel, problem, np.zeros((problem.n, problem.k), ml_dtypes.bfloat16))
    bias = {"bias": torch.empty(problem.n, device="meta")} if problem.bias else {}
    x = torch.empty((problem.m, problem.k), dtype=torch.bfloat16, device="meta")
    kernel.bind(problem, SimpleNamespace(recorder=None, launcher=launcher))(x, w, **bias)
    return found


def assert_right(target: str, problem: LinearProblem, op: str = "linear") -> None:
    """Every kernel that takes the problem is within the op's tolerance."""
    case, kernels = case_of(problem), taking(target, problem, op)
    assert kernels
    for kernel in kernels:
        assert not compare(SPECS[op], case, to_host(result_of(kernel, case))), kernel.name


# ---- results ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", ["sm90", "gfx942", "gfx1201"])
def test_tiles_of_targets(target: str, scheme: str) -> None:
    """Tiles that m, n and k do not fill, with a bias, in each tier."""
    for m in (3, 33, 70):
        assert_right(target, problem_of(m, 40, 288, scheme, bias=True))


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiles_of_other_dtypes(dtype: str) -> None:
    for m, k in ((2, 96), (70, 96), (70, 37)):
        assert_right("sm100", problem_of(m, 33, k, dtype=dtype))
        assert_right("gfx1100", problem_of(m, 33, k, "int8", dtype=dtype))


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_in_parts(scheme: str) -> None:
    """Few tiles and long sums are split; the last part may be shorter, and every run gives the same bits."""
    problem = problem_of(2, 30, 8192 + 64, scheme, bias=True)
    kernel, case = taking("gfx942", problem)[0], case_of(problem)
    launches = launches_of(kernel, problem)
    assert launches["linear_kernel"][0][1] == 8 and "add_parts_kernel" in launches
    first, again = (result_of(kernel, case) for _ in range(2))
    assert torch.equal(first, again)
    assert not compare(SPECS["linear"], case, to_host(first))


def test_rows_at_a_stride() -> None:
    """Rows that begin at whole vectors are read in place, others copied; results are the same."""
    problem = problem_of(5, 24, 64)
    case, kernel = case_of(problem), taking("sm90", problem)[0]
    dense = from_host(operand(case.args[0], problem))
    wide = torch.full((5, 160), torch.nan, dtype=torch.bfloat16)
    aligned, odd = wide[:, 16:80], torch.full((5, 71), torch.nan, dtype=torch.bfloat16)[:, 3:67]
    across = torch.empty((64, 5), dtype=torch.bfloat16).t()
    for view, in_place in ((aligned, True), (odd, False), (across, False)):
        view.copy_(dense)
        assert (readable(view) is view) == in_place
        assert torch.equal(result_of(kernel, case, view), result_of(kernel, case))


def test_heads_that_lie_before_rows() -> None:
    problem = problem_of(5, 24, 64, heads=3)
    case, kernel = case_of(problem), taking("sm90", problem, "head_linear")[0]
    dense = from_host(operand(case.args[0], problem))
    moved = dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert readable(moved) is moved and not moved.is_contiguous()
    assert torch.equal(result_of(kernel, case, moved), result_of(kernel, case))
    assert not compare(SPECS["head_linear"], case, to_host(result_of(kernel, case, moved)))


def test_nothing_of_padding_is_read() -> None:
    """NaN in one row of x stays there, also where a tile reads it in the place of rows that are not there."""
    problem = problem_of(3, 24, 64)
    case, kernel = case_of(problem), taking("sm90", problem)[0]
    x = from_host(operand(case.args[0], problem)).clone()
    x[0] = torch.nan
    found = result_of(kernel, case, x)
    assert found[0].isnan().all() and torch.equal(found[1:], result_of(kernel, case)[1:])


# ---- codes -----------------------------------------------------------------------------------------------------


def odd_rows() -> Any:
    """f32[n, 600]: rows of all sizes, of halves between codes, of zeros, and such as have no codes."""
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((40, 600)) * 2.0 ** rng.uniform(-120, 120, (40, 1))).astype(np.float32)
    x[0] = 0
    x[1] = rng.integers(-127, 127, 600) + 0.5
    x[1, 0] = 127
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    halves = (codes[1:] + codes[:-1]) / 2
    x[2] = np.resize(np.concatenate([halves, [448]]), 600)
    x[3, 5], x[4, 6], x[5, 7] = np.nan, np.inf, -np.inf
    x[6] = 2.0**-130
    return x


@pytest.mark.parametrize(("scheme", "target"), [("w8a8_int8", "sm80"), ("w8a8_fp8", "sm90"), ("w8a8_fp8", "gfx942")])
def test_codes_of_activations_to_the_bit(scheme: str, target: str) -> None:
    x = odd_rows()
    codes = codes_of(scheme, TARGETS[target])
    expected, scales = quantize_rows(x, scheme)
    if codes.dtype == FNUZ:
        expected, scales = fnuz_codes(expected, scales)
    got, got_scales = quantized(SESSION, TARGETS[target], from_host(x), codes)
    assert np.array_equal(to_host(got_scales), scales, equal_nan=True)
    assert np.array_equal(to_host(got).astype(np.float32), expected.astype(np.float32))  # -0 is 0
    assert to_host(got).dtype == expected.dtype


def test_long_rows_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's largest number may lie in any of the blocks that are read one after another."""
    monkeypatch.setattr("lineshaft_triton.kernels.quant.WIDEST", 256)
    codes, x = codes_of("w8a8_int8", TARGETS["sm80"]), odd_rows()
    expected, scales = quantize_rows(x, "int8")
    got, got_scales = quantized(SESSION, TARGETS["sm80"], from_host(x), codes)
    assert np.array_equal(to_host(got), expected) and np.array_equal(to_host(got_scales), scales, equal_nan=True)


def test_fp8_is_fnuz_on_gfx942_alone() -> None:
    """Weights of scheme fp8 are packed in the target's own flavour, which stands for the very same numbers."""
    w = odd_rows().astype(ml_dtypes.bfloat16)[:3]
    w[0, ::2] = -w[0, ::2]  # -0
    problem = problem_of(1, w.shape[0], w.shape[1], "fp8")
    plain, scales = quantize_rows(w, "fp8")
    for target in set(TARGETS) - set(WITHOUT_FP8):
        kernel = taking(target, problem)[0]
        arrays = weight_of(kernel, problem, w).arrays
        flavour = FNUZ if target == "gfx942" else FN
        assert kernel.layout == ("fp8_fnuz_rows" if flavour == FNUZ else "fp8_rows")
        assert str(arrays["q"].dtype) == f"torch.{flavour}"
        assert (arrays["q"].view(torch.uint8) == 0x80).any() == (flavour == FN)  # NaN in fnuz, -0 elsewhere
        numbers = arrays["q"].float() * arrays["scale"][:, None]
        assert np.array_equal(to_host(numbers), plain.astype(np.float32) * scales[:, None])


# ---- who takes what --------------------------------------------------------------------------------------------


def problems() -> Iterator[LinearProblem]:
    for scheme in SCHEMES:
        for dtype in ("bfloat16", "float16", "float32"):
            for m in (0, 1, 16, 17, 64, 65, 512, 1023, 1024, 100_000):
                for k in (4096, 4104) if scheme != "int4" else (4096,):
                    yield problem_of(m, 4096, k, scheme, dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_one_kernel_of_the_highest_priority_takes_a_problem(target: str) -> None:
    for problem in problems():
        found = taking(target, problem)
        inexact = problem.scheme == "w8a8_fp8" and problem.dtype == "float32"
        if inexact or (problem.scheme.endswith("fp8") and target in WITHOUT_FP8):
            assert not found
        else:
            assert found[0].priority == TRITON and [k.priority for k in found].count(TRITON) == 1, problem.describe()
            assert all(kernel.tunable for kernel in found)
        heads = taking(target, replace(problem, heads=4), "head_linear") if problem.scheme == "none" else []
        assert len(heads) == (problem.scheme == "none")


def test_alternates_are_for_many_rows_of_16_bits() -> None:
    alternates = [kernel for kernel in taking("sm90", problem_of(512, 64, 64)) if kernel.priority < TRITON]
    assert [kernel.name for kernel in alternates] == ["triton_linear_tall", "triton_linear_wide"]
    for problem in (problem_of(64, 64, 64), problem_of(512, 64, 64, dtype="float32"), problem_of(512, 64, 67)):
        assert not [kernel for kernel in taking("sm90", problem) if kernel.priority < TRITON]


@pytest.mark.parametrize(
    ("target", "kernel", "problem", "reason"),
    [
        ("sm90", "few", problem_of(1, 8, 8, dtype="float64"), "accumulates in float32"),
        ("sm90", "few", problem_of(17, 8, 8), "0 rows to 16"),
        ("sm90", "bulk", problem_of(17, 8, 8), "1024 rows and more"),
        ("sm90", "few", problem_of(1, 8, 32, "int8"), "of scheme none, not int8"),
        ("sm80", "fp8_few", problem_of(1, 8, 32, "fp8"), "sm80 reads no floats of eight bits"),
        ("gfx1100", "w8a8_fp8_few", problem_of(1, 8, 32, "w8a8_fp8"), "gfx1100 reads no floats of eight bits"),
        ("sm90", "w8a8_fp8_few", problem_of(1, 8, 32, "w8a8_fp8", "float32"), "less exactly than float32"),
        ("sm90", "w8a8_int8_few", problem_of(1, 8, 140_000, "w8a8_int8"), "133144 terms at most, not 140000"),
        ("sm90", "int4_few", problem_of(1, 8, 30, "int4", group_size=6), "a multiple of 32 codes, not of 6"),
        ("sm90", "tall", problem_of(512, 8, 64, dtype="float32"), "for numbers of 16 bits"),
    ],
)  # fmt: skip
def test_reasons(target: str, kernel: str, problem: LinearProblem, reason: str) -> None:
    made = {found.name: found for found in kernels_of(target)}[f"triton_linear_{kernel}"]
    assert reason in (made.supports(problem) or "")


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("target", TARGETS)
def test_tables_have_tiles_for_every_tier_of_every_target(target: str) -> None:
    where = TARGETS[target]
    for kind, table in TABLES.items():
        if kind == "fp8" and not where.fp8:
            assert target not in table
            continue
        tiers = TIERS if kind == "half" else CODE_TIERS
        assert len(table[target]) >= len(tiers), kind
        for tier, (rows, cols, terms, warps, stages) in zip(TIERS, table[target], strict=False):
            assert all(size & (size - 1) == 0 for size in (rows, cols, terms, warps)) and stages > 0
            assert warps * where.warp <= 1024
            # rows of a tier's last problem fit as few tiles as there can be
            assert rows <= 64 or tier.first > 64, (kind, tier.name)
    for dtype in ("bfloat16", "float32"):
        for even in (True, False):
            kind = table_of(dtype, even)
            for i, _ in enumerate(EXPERT_TIERS):
                assert (
                    TABLES[f"gated_{kind}"][target][i][0] == TABLES[kind][target][i][0]
                )  # one table of tiles serves both


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize(
    ("target", "scheme", "m", "expects"),
    [
        ("sm80", "none", 4096, "mma.bf16"), ("sm90", "none", 4096, "wgmma.bf16"), ("sm90", "none", 1, "mma.bf16"),
        ("sm100", "none", 4096, "tcgen05.bf16"), ("sm100", "int4", 1, "mma.bf16"), ("sm90", "w8a8_int8", 1, "mma.i8"),
        ("sm90", "w8a8_fp8", 1, "wgmma.fp8"), ("sm100", "w8a8_fp8", 64, "tcgen05.fp8"),
        ("sm120", "w8a8_fp8", 512, "mma.fp8"), ("gfx942", "w8a8_fp8", 512, "mfma.fp8"),
        ("gfx90a", "w8a8_int8", 512, "mfma.i8"), ("gfx1201", "w8a8_fp8", 1, "wmma.fp8"),
        ("gfx1100", "int8", 64, "wmma.bf16"),
    ],
)  # fmt: skip
def test_instructions_that_are_expected(target: str, scheme: str, m: int, expects: str) -> None:
    """What is stated before compiling: whole groups of warps multiply tiles of 64 rows and more, and fp8 always."""
    problem = problem_of(m, 256, 256, scheme)
    assert launches_of(taking(target, problem)[0], problem)["linear_kernel"][1] == expects
