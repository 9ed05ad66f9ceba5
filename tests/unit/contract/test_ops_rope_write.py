"""The problem of `rope_write_kv` is both of its parts', and keys in codes of eight bits are judged code by code."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from lineshaft_contract.ops.spec import Tolerance, numpy_dtype
from lineshaft_contract.problems import KVProblem, RopeProblem, RopeScaling, RopeWriteProblem

ROPE = RopeProblem(
    dtype="bfloat16", dim=8, base=5e5, head_dim=16, q_heads=8, kv_heads=2, rows=5, max_position=64,
    scaling=RopeScaling(kind="linear", factor=2.0), interleaved=True,
)  # fmt: skip
KV = KVProblem(
    dtype="bfloat16", kv_heads=2, qk_dim=16, v_dim=12, page_size=24, kv_dtype="float8_e5m2", group=1, rows=5,
    kv_scheme="tensor",
)  # fmt: skip
FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def test_a_problem_is_made_of_its_parts_and_gives_them_back() -> None:
    both = RopeWriteProblem.of(ROPE, KV)
    assert (both.rope, both.kv) == (ROPE, KV)
    assert (type(both.rope), type(both.kv)) == (RopeProblem, KVProblem)
    assert both.page_bytes == KV.page_bytes and both == RopeWriteProblem.of(ROPE, KV)


def test_features_and_the_description_are_those_of_both() -> None:
    both = RopeWriteProblem.of(ROPE, KV)
    assert both.features() == ROPE.features() | KV.features() == {"interleaved", "kv_scheme"}
    words = set(both.describe().split())
    assert words == set(ROPE.describe().split()) | set(KV.describe().split())


@pytest.mark.parametrize("dtype", FP8)
def test_keys_in_codes_of_eight_bits_may_be_one_code_off_and_no_more(dtype: str) -> None:
    kind, problem = numpy_dtype(dtype), RopeWriteProblem.of(ROPE, replace(KV, dtype="float32"))
    finite = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
    values = np.unique(finite[np.isfinite(finite)])
    exact = values.astype(kind)
    for near in (values[1:-1], np.repeat(values[2], len(values) - 2)):  # the latter: nothing is large
        where = np.searchsorted(values, near)
        right = values[where].astype(kind)
        for side in (-1, 1):
            assert Tolerance().check(problem, values[where + side].astype(kind), right, right) is None
    for index in range(len(values)):
        got = exact.copy()
        got[index] = exact[index - 3 if index > len(values) // 2 else index + 3]
        if abs(values[index]) > 1e-3 * values[-1]:  # near 0 codes lie closer than the roundings of the largest
            assert Tolerance().check(problem, got, exact, exact) is not None, values[index]


def test_a_rounding_of_the_largest_is_no_error_of_a_tiny_one() -> None:
    problem = RopeWriteProblem.of(ROPE, KV)
    exact = np.array([4e4, 1e-3, 1e-4]).astype(ml_dtypes.float8_e5m2)
    got = np.array([4e4, 2e-3, 4e-4]).astype(ml_dtypes.float8_e5m2)  # off by far less than an eps of 4e4 in bfloat16
    assert Tolerance().check(problem, got, exact, exact) is None
