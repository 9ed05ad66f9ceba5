"""Row-wise kernels, against the contract's references: wide rows, strided arrays, and what is declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lineshaft_contract.kernels import Kernel
from lineshaft_contract.ops import all_ops
from lineshaft_contract.ops.run import compare, rounded
from lineshaft_contract.ops.spec import Case, WeightArg
from lineshaft_contract.problems import EmbedProblem, NormProblem, PointwiseProblem, Problem
from lineshaft_torch.arrays import from_host, to_host

Bind = Callable[[str, Problem], Any]


def complaints(op: str, problem: Problem, args: tuple[Any, ...], result: Any) -> list[str]:
    outputs = tuple(map(to_host, result)) if isinstance(result, tuple) else to_host(result)
    return compare(all_ops()[op], Case("test", problem, args), outputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_too_wide_to_be_held_is_read_twice(bind: Bind, dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, r = rng.standard_normal((2, 3, 20_000))
    w = WeightArg(1 + 0.1 * rng.standard_normal(20_000), "norm")
    problem = NormProblem(dtype=dtype, width=20_000, eps=1e-5, rows=3)
    own = [from_host(rounded(each, dtype)) for each in (x, r, w.array)]
    assert complaints("rms_norm", problem, (x, w), bind("triton_rms_norm", problem)(own[0], own[2])) == []
    assert complaints("add_rms_norm", problem, (x, r, w), bind("triton_add_rms_norm", problem)(*own)) == []


def test_heads_of_a_fused_projection_are_read_in_place(bind: Bind) -> None:
    rng = np.random.default_rng(2)
    fused = rng.standard_normal((5, 100))
    own = from_host(rounded(fused, "float32"))
    x, y = fused[:, 4:52].reshape(5, 3, 16), fused[:, 52:100].reshape(5, 3, 16)
    own_x, own_y = own[:, 4:52].view(5, 3, 16), own[:, 52:100].view(5, 3, 16)
    w = WeightArg(rng.standard_normal(16), "norm")
    weight = from_host(rounded(w.array, "float32"))
    norm = NormProblem(dtype="float32", width=16, eps=1e-5, rows=15)
    assert complaints("rms_norm", norm, (x, w), bind("triton_rms_norm", norm)(own_x, weight)) == []
    assert complaints("add_rms_norm", norm, (x, y, w), bind("triton_add_rms_norm", norm)(own_x, own_y, weight)) == []
    plain = PointwiseProblem(dtype="float32", rows=15, width=16)
    assert complaints("add", plain, (x, y), bind("triton_add", plain)(own_x, own_y)) == []


def test_where_rows_lie() -> None:
    from lineshaft_triton.kernels.rowwise import strided

    whole = torch.arange(240.0).view(4, 60)
    for x in (whole, whole[:, 6:30], whole[:, 6:30].view(4, 3, 8), whole.view(4, 3, 4, 5)):
        same, (inner, outer, step) = strided(x)
        assert same.data_ptr() == x.data_ptr()
        rows = x.reshape(-1, x.shape[-1])
        starts = [same.storage_offset() + r // inner * outer + r % inner * step for r in range(len(rows))]
        assert torch.equal(whole.view(-1)[starts], rows[:, 0])
    for x in (whole[:, ::2], whole.T, whole.view(4, 3, 4, 5)[:, :, :2]):
        copy, (inner, outer, step) = strided(x)
        assert copy.is_contiguous() and torch.equal(copy, x) and (inner, outer, step) == (1, x.shape[-1], 0)


@pytest.mark.parametrize("rows", [1, 7, 5000])
@pytest.mark.parametrize("width", [1, 33, 128, 4096, 200_000])
def test_tiles_cover_all_rows_with_programs_of_a_bounded_size(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int
) -> None:
    from lineshaft_triton.kernels import rowwise
    from lineshaft_triton.targets import TARGETS

    monkeypatch.setattr(rowwise, "interpreting", lambda: False)
    for target in TARGETS.values():
        config = rowwise.tiles(rows, width, target)
        high, wide = config.block["ROWS"], config.block["BLOCK"]
        assert high * wide <= rowwise.VALUES and config.num_warps * target.warp <= rowwise.THREADS
        programs = rowwise.grid_over(rows, width, config)
        assert programs[0] * high >= rows and programs[1] * wide >= width
        assert (programs[0] - 1) * high < rows and (programs[1] - 1) * wide < width


def test_rows_of_a_wider_array_are_gathered_and_merged(bind: Bind) -> None:
    rng = np.random.default_rng(4)
    wide, other = rng.standard_normal((6, 40)), rng.standard_normal((3, 24))
    x, embeds, own = wide[:, 8:24], other[:, 4:20], from_host(rounded(wide, "float32"))[:, 8:24]
    index, source = np.array([5, 0, 5], np.int32), np.array([-1, 2, 0, -1, 1, -1], np.int32)
    gather = PointwiseProblem(dtype="float32", rows=3, width=16)
    gathered = bind("triton_gather_rows", gather)(own, from_host(index))
    assert complaints("gather_rows", gather, (x, index), gathered) == []
    merge = PointwiseProblem(dtype="float32", rows=6, width=16)
    given = own, from_host(rounded(other, "float32"))[:, 4:20], from_host(source)
    assert complaints("merge_rows", merge, (x, embeds, source), bind("triton_merge_rows", merge)(*given)) == []


def test_float64_and_floats_of_eight_bits_are_declined_with_a_reason(kernels: dict[str, Kernel]) -> None:
    pointwise = ("add", "silu_mul", "gelu_mul", "gather_rows", "merge_rows")
    for dtype in ("float64", "float8_e4m3fn"):
        problems: dict[str, Problem] = {name: PointwiseProblem(dtype=dtype, rows=2, width=8) for name in pointwise}
        problems["embed"] = EmbedProblem(dtype=dtype, vocab=4, width=8, rows=2)
        problems |= {name: NormProblem(dtype=dtype, width=8, eps=1e-5) for name in ("rms_norm", "add_rms_norm")}
        for op, problem in problems.items():
            assert dtype in (kernels[f"triton_{op}"].supports(problem) or ""), op
