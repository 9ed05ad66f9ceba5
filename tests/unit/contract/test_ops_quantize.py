"""The rule of quantized weights against itself written another way: nearest codes, scales, what is not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lineshaft.errors import ContractViolation
from lineshaft_contract.ops import all_ops, quantize
from lineshaft_contract.ops.linear import linear
from lineshaft_contract.ops.quantize import (
    ACTIVATION_SCHEMES,
    WEIGHT_SCHEMES,
    fnuz_codes,
    pack_nibbles,
    quantize_groups,
    quantize_rows,
    quantized_bytes,
    unpack_nibbles,
)
from lineshaft_contract.ops.spec import Numerics
from lineshaft_contract.problems import LinearProblem

SCHEMES = tuple(WEIGHT_SCHEMES)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)
WEIGHTS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=NUMBERS)


def bits(array: Any) -> bytes:
    return bytes(np.ascontiguousarray(array).view(np.uint8))


def nearest(value: float, scheme: str) -> float:
    """The code nearest to a number, of all that there are; of two as near, the one with an even last bit."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8 if scheme == "int8" else F8)
    codes = codes[codes != -128] if scheme == "int8" else codes[np.isfinite(codes.astype(float))]
    distance = np.abs(codes.astype(float) - value)
    near = codes[distance == distance.min()]
    return float(next(code for code in near if not code.view(np.uint8) & 1)) if len(near) > 1 else float(near[0])


@given(WEIGHTS)
def test_int8_is_off_by_half_a_step_at_most(w: Any) -> None:
    q, scale = quantize_rows(w, "int8")
    assert q.dtype == np.int8 and scale.dtype == np.float32 and q.shape == w.shape
    assert (scale >= 2.0**-126).all() and (np.abs(q.astype(int)) <= 127).all()
    off = np.abs(w.astype(float) - q * scale[:, None].astype(float))
    assert (off <= scale[:, None] / 2 * (1 + 2**-14)).all()  # a quotient of up to 127 is rounded to 24 bits first


@given(WEIGHTS)
def test_fp8_is_off_by_half_a_unit_in_its_last_place_at_most(w: Any) -> None:
    q, scale = quantize_rows(w, "fp8")
    assert q.dtype == F8 and np.isfinite(q.astype(float)).all()
    unit = np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(q.astype(float)), 2**-6))) * 2**-3, 2**-9)
    off = np.abs(w.astype(float) / scale[:, None].astype(float) - q.astype(float))
    assert (off <= unit / 2 * (1 + 2**-14)).all()


@given(WEIGHTS, st.sampled_from(SCHEMES))
def test_codes_of_the_largest_are_the_top_and_signs_mirror(w: Any, scheme: str) -> None:
    q, scale = quantize_rows(w, scheme)
    top, largest = WEIGHT_SCHEMES[scheme].top, np.abs(w).max(1)
    tiny = largest / np.float32(top) < 2.0**-126
    assert (np.abs(q.astype(float)).max(1) == np.where(tiny, 0, top)).all()
    mirrored, same = quantize_rows(-w, scheme)
    np.testing.assert_array_equal(mirrored.astype(float), -q.astype(float))
    np.testing.assert_array_equal(same, scale)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_the_nearest_and_halves_go_to_even(scheme: str) -> None:
    top = WEIGHT_SCHEMES[scheme].top  # a row whose largest is the top has the scale 1
    halves = [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 17.0, 19.0, 2**-10, 3 * 2**-10, 0.3, -77.7, 0.0]
    w = np.array([[top, *halves, *np.random.default_rng(0).uniform(-top, top, 200)]], np.float32)
    q, scale = quantize_rows(w, scheme)
    assert scale.tolist() == [1.0]
    assert q[0].astype(float).tolist() == [nearest(value, scheme) for value in w[0].tolist()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_and_of_next_to_nothing_have_the_scale_1(scheme: str) -> None:
    w = np.array([[0, -0.0], [1e-45, -1e-40], [2.0**-110, 0]], np.float32)
    q, scale = quantize_rows(w, scheme)
    assert scale[:2].tolist() == [1.0, 1.0] and not q[:2].astype(float).any()
    assert scale[2] >= 2.0**-126 and float(q[2, 0]) == WEIGHT_SCHEMES[scheme].top


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_row_that_is_not_finite_is_nan_and_touches_no_other(scheme: str, bad: float) -> None:
    w = np.random.default_rng(0).standard_normal((3, 8))
    right, scales = quantize_rows(w, scheme)
    w[1, 5] = bad
    q, scale = quantize_rows(w, scheme)
    assert np.isnan(scale[1]) and not q[1].astype(float).any()
    assert bits(q[[0, 2]]) == bits(right[[0, 2]]) and bits(scale[[0, 2]]) == bits(scales[[0, 2]])
    out = linear(LinearProblem(dtype="float64", n=3, k=8, scheme=scheme), np.ones((2, 8)), w)
    assert np.isnan(out).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_are_those_numbers_in_float32(scheme: str, dtype: str) -> None:
    w = np.random.default_rng(0).standard_normal((5, 33)).astype(getattr(ml_dtypes, dtype, dtype))
    for one, other in zip(quantize_rows(w, scheme), quantize_rows(w.astype(np.float32), scheme), strict=True):
        assert bits(one) == bits(other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_size_of_a_chunk_changes_nothing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).standard_normal((7, 33)).astype(np.float32)
    whole = quantize_rows(w, scheme)
    for chunk in (1, 70):
        monkeypatch.setattr(quantize, "_CHUNK_ELEMENTS", chunk)
        assert list(map(bits, quantize_rows(w, scheme))) == list(map(bits, whole))
    assert quantize_rows(w[:0], scheme)[0].shape == (0, 33)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_sums_products_with_rounded_weights(scheme: str) -> None:
    rng = np.random.default_rng(0)
    x, w, bias = rng.standard_normal((3, 10)), rng.standard_normal((4, 10)), rng.standard_normal(4)
    problem = LinearProblem(dtype="float64", n=4, k=10, bias=True, scheme=scheme)
    got = linear(problem, x, w, bias=bias)
    for o in range(4):
        scale = float(np.abs(w[o].astype(np.float32)).max() / np.float32(WEIGHT_SCHEMES[scheme].top))
        row = [nearest(float(np.float32(v) / np.float32(scale)), scheme) * scale for v in w[o]]
        for t in range(3):
            assert got[t, o] == pytest.approx(sum(x[t, i] * row[i] for i in range(10)) + bias[o], rel=1e-12)
    assert np.abs(got - (x @ w.T + bias)).max() > 1e-3
    narrow = linear(problem, *(v.astype(np.float32) for v in (x, w)), num=Numerics.of("float32", "float32"))
    assert narrow.dtype == np.float32


def test_a_scheme_without_codes_of_eight_bits_has_no_rule_for_rows() -> None:
    for scheme in ("int4", "none", "int3"):
        with pytest.raises(ContractViolation, match=f"scheme '{scheme}'; expected one of int8, fp8, w8a8_int8, w8a8_"):
            quantize_rows(np.ones((1, 1)), scheme)


def test_quantized_weights_move_a_byte_each_and_compute_as_much() -> None:
    spec, plain = all_ops()["linear"], LinearProblem(dtype="bfloat16", m=1, n=100, k=50)
    for scheme in SCHEMES:
        problem = LinearProblem(dtype="bfloat16", m=1, n=100, k=50, scheme=scheme)
        assert spec.flops(problem) == spec.flops(plain)
        assert spec.moved(plain) - spec.moved(problem) == 2 * 5000 - quantized_bytes(100, 50) == 5000 - 400
    grouped = LinearProblem(dtype="bfloat16", m=1, n=100, k=50, scheme="int4", group_size=10)
    assert spec.moved(plain) - spec.moved(grouped) == 2 * 5000 - quantized_bytes(100, 50, 10) == 2 * 5000 - 2500 - 2000


# ---- activations too -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_the_reference_multiplies_codes_of_both_operands(scheme: str) -> None:
    rng, rule = np.random.default_rng(0), ACTIVATION_SCHEMES[scheme]
    x, w, bias = rng.standard_normal((3, 10)), rng.standard_normal((4, 10)), rng.standard_normal(4)
    problem = LinearProblem(dtype="float64", n=4, k=10, bias=True, scheme=scheme)
    got = linear(problem, x, w, bias=bias)
    (a, tokens), (b, rows) = ((q.astype(float), s.astype(float)) for q, s in (quantize_rows(y, rule) for y in (x, w)))
    for t in range(3):
        for o in range(4):
            exact = sum(a[t, i] * b[o, i] for i in range(10)) * tokens[t] * rows[o] + bias[o]
            assert got[t, o] == pytest.approx(exact, rel=1e-12)
    weights_alone = linear(replace(problem, scheme=rule), x, w, bias=bias)
    assert np.abs(got - weights_alone).max() > 1e-3


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_is_nan_and_touches_no_other(scheme: str, bad: float) -> None:
    x, w = np.random.default_rng(0).standard_normal((2, 3, 8))
    problem = LinearProblem(dtype="float64", n=3, k=8, scheme=scheme)
    right = linear(problem, x, w)
    x[1, 5] = bad
    got = linear(problem, x, w)
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], right[[0, 2]])


# ---- groups of four bits -------------------------------------------------------------------------------------------


@given(arrays(np.float32, st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 24])), elements=NUMBERS))
def test_int4_is_off_by_half_a_step_and_by_a_whole_one_at_the_far_end(w: Any) -> None:
    q, scale = quantize_groups(w, 8)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (len(w), w.shape[1] // 8)
    assert q.min() >= -8 and q.max() <= 7 and (np.abs(scale) >= 2.0**-126).all()
    each = scale.astype(float).repeat(8, 1)
    off = np.abs(w.astype(float) - q * each) / np.abs(each)
    assert (off <= np.where(q == 7, 1, 0.5) * (1 + 2**-14)).all()


@given(arrays(np.float32, (3, 16), elements=NUMBERS))
def test_the_largest_of_a_group_has_the_code_of_most_magnitude_and_mirrors(w: Any) -> None:
    q, scale = quantize_groups(w, 8)
    grouped = w.reshape(3, 2, 8)
    first = np.abs(grouped).argmax(2)[..., None]
    largest = np.take_along_axis(grouped, first, 2)[..., 0]
    big = np.abs(largest) >= 2.0**-123
    assert (np.take_along_axis(q.reshape(3, 2, 8), first, 2)[..., 0] == np.where(big, -8, 0)).all()
    np.testing.assert_array_equal(scale, np.where(big, largest / np.float32(-8), 1))
    mirrored, other = quantize_groups(-w, 8)
    np.testing.assert_array_equal(other[big], -scale[big])
    np.testing.assert_array_equal(mirrored.reshape(3, 2, 8)[big], q.reshape(3, 2, 8)[big])


def test_codes_of_groups_are_the_nearest_and_halves_go_to_even() -> None:
    w = np.array([[8, 0.5, 1.5, -2.5, 7.5, -7.49, 3.2, -8, -8, 7, *range(6)]], np.float32)
    q, scale = quantize_groups(w, 8)
    assert scale.tolist() == [[-1.0, 1.0]]
    assert q.tolist() == [[-8, 0, -2, 2, -8, 7, -3, 7, -8, 7, *range(6)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_group_that_is_not_finite_makes_its_row_nan_and_touches_no_other_group(bad: float) -> None:
    w = np.random.default_rng(0).standard_normal((3, 16))
    right, scales = quantize_groups(w, 8)
    w[1, 10] = bad
    q, scale = quantize_groups(w, 8)
    assert np.isnan(scale).tolist() == [[False, False], [False, True], [False, False]] and not q[1, 8:].any()
    kept = np.isfinite(scale)
    assert bits(scale[kept]) == bits(scales[kept]) and bits(q[:, :8]) == bits(right[:, :8])
    problem = LinearProblem(dtype="float64", n=3, k=16, scheme="int4", group_size=8)
    assert np.isnan(linear(problem, np.ones((2, 16)), w)).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize("size", [2, 8, 32, 64])
def test_numbers_that_codes_of_groups_stand_for_are_kept(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    q, scale = quantize_groups(w, size)
    again, same = quantize_groups(q * scale.repeat(size, 1), size)
    assert bits(again) == bits(q) and bits(same) == bits(scale)
    monkeypatch.setattr(quantize, "_CHUNK_ELEMENTS", 130)
    assert list(map(bits, quantize_groups(w, size))) == [bits(q), bits(scale)]


def test_the_reference_restores_each_weight_of_a_group() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 16)), rng.standard_normal((4, 16))
    q, scale = quantize_groups(w, 8)
    got = linear(LinearProblem(dtype="float64", n=4, k=16, scheme="int4", group_size=8), x, w)
    for t, o in np.ndindex(3, 4):
        exact = sum(x[t, i] * float(q[o, i]) * float(scale[o, i // 8]) for i in range(16))
        assert got[t, o] == pytest.approx(exact, rel=1e-12)


def test_two_codes_lie_in_a_byte_the_first_in_its_low_half() -> None:
    assert pack_nibbles(np.array([[-8, 7, 0, -1]], np.int8)).tolist() == [[0xF0, 0x78]]
    every = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)), -1).reshape(-1, 2).astype(np.int8)
    packed = pack_nibbles(every)
    assert packed.dtype == np.uint8 and len(np.unique(packed)) == 256
    np.testing.assert_array_equal(unpack_nibbles(packed), every)


# ---- the other flavour of fp8 --------------------------------------------------------------------------------------


def test_codes_of_the_other_flavour_stand_for_the_same_numbers_all_256_of_them() -> None:
    codes = np.arange(256, dtype=np.uint8).view(F8)
    scale = np.array([0.3, 2.0**-126, 2.0**100, np.nan], np.float32)
    other, doubled = fnuz_codes(codes, scale)
    assert other.dtype == np.dtype(ml_dtypes.float8_e4m3fnuz) and doubled.dtype == np.float32
    before, after = ((q.astype(float) * s.astype(float)[:, None]) for q, s in ((codes, scale), (other, doubled)))
    np.testing.assert_array_equal(after, before)
    raw = other.view(np.uint8)
    odd = np.isnan(codes.astype(float)) | (codes.view(np.uint8) == 0x80)
    assert (raw[~odd] == np.arange(256)[~odd]).all() and raw[0x80] == 0
    assert np.isnan(other.astype(float)).tolist() == np.isnan(codes.astype(float)).tolist()
