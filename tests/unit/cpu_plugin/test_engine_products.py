"""Products of the native engine: many rows, and weights so deep that they are met a part at a time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.unit.cpu_plugin.taped import LEVELS, Live, Packed, close, run

from lineshaft_contract.ops.linear import linear
from lineshaft_contract.ops.spec import EXACT, Numerics
from lineshaft_contract.problems import LinearProblem
from lineshaft_cpu.engine.kernels.products import MOST_ROWS, rows_of_item

BF16: Any = ml_dtypes.bfloat16


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "live", "k"), [(20, 17, 1216), (64, 33, 1216), (70, 70, 1184), (700, 650, 608)])
def test_rows_meet_a_deep_weight_a_part_at_a_time(level: str, rows: int, live: int, k: int) -> None:
    rng = np.random.default_rng(0)
    n = 80
    x = rng.standard_normal((rows, k)).astype(BF16)
    w = (rng.standard_normal((n, k)) / k**0.5).astype(BF16)
    problem = LinearProblem(dtype="bfloat16", m=rows, n=n, k=k)
    got = run("cpu_linear", problem, Live(x, live), Packed(w, "linear"), level=level)[0][:live]
    exact, reference = (linear(problem, x[:live], w, num=num) for num in (EXACT, Numerics("float32", "bfloat16")))
    close(got, exact, reference)


def test_an_item_never_has_more_rows_than_their_sums_have_places() -> None:
    assert [rows_of_item(k, "bfloat16") for k in (32, 576, 1536, 10**6)] == [MOST_ROWS, MOST_ROWS, 256, 32]
