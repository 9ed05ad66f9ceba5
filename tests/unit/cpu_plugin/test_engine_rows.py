"""Row-wise kernels of the native engine on several threads, with rows of padding tokens that hold garbage."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.unit.cpu_plugin.taped import LEVELS, Live, run

from lineshaft_contract.ops import attention, pointwise
from lineshaft_contract.ops.rows import merge_rows
from lineshaft_contract.problems import MergeProblem, PointwiseProblem


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
def test_gates_of_large_and_small_numbers(level: str, op: str) -> None:
    x = np.random.default_rng(0).standard_normal((40, 2 * 1031)).astype(np.float32)
    x[0, :1031] = np.linspace(-200, 200, 1031)
    x[1, :1031] = np.linspace(-1e-3, 1e-3, 1031)
    problem = PointwiseProblem(dtype="float32", rows=40, width=1031)
    got = run(f"cpu_{op}", problem, x, level=level)[0]
    wanted = getattr(pointwise, op)(problem, x)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merged_rows_take_no_source_of_padding_tokens(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    x, embeds = (rng.standard_normal((rows, 33)).astype(dtype) for rows in (50, 7))
    source = rng.integers(-1, 7, 50).astype(np.int32)
    wanted = merge_rows(PointwiseProblem(dtype="float32"), x, embeds, source)[:30]
    source[30:] = 10**9
    problem = PointwiseProblem(dtype=x.dtype.name, rows=50, width=33)
    got = run("cpu_merge_rows", problem, Live(x, 30), embeds, Live(source, 30))[0]
    assert np.array_equal(got[:30].astype(np.float64), wanted.astype(np.float64))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_states_merge_whatever_part_is_empty(level: str, dtype: Any, with_sinks: bool) -> None:
    rng = np.random.default_rng(2)
    parts, rows, heads, width = 5, 90, 3, 70
    out = rng.standard_normal((parts, rows, heads, width)).astype(dtype)
    lse = (rng.standard_normal((parts, rows, heads)) * 20).astype(np.float32)
    lse[0, :10], lse[:, 20], lse[1:, 30] = -np.inf, -np.inf, -np.inf
    out[lse == -np.inf] = np.nan
    kwargs: dict[str, Any] = {"sinks": rng.standard_normal(heads).astype(dtype)} if with_sinks else {}
    problem = MergeProblem(dtype=out.dtype.name, parts=parts, rows=rows, heads=heads, v_dim=width, sinks=with_sinks)
    got = run("cpu_merge_states", problem, out, lse, level=level, **kwargs)[0].astype(np.float64)
    wanted = attention.merge_states(problem, out, lse, **kwargs)
    eps = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(got, wanted, rtol=2 * eps, atol=2 * eps)
    assert not got[20].any()
