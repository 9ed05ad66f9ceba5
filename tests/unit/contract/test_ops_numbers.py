"""References of products, norms, rope, row lookups and gated activations against formulas written another way."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import ContractViolation
from lineshaft_contract.ops.linear import head_linear, linear
from lineshaft_contract.ops.norm import add_rms_norm, rms_norm
from lineshaft_contract.ops.pointwise import add, concat, gelu_mul, silu_mul
from lineshaft_contract.ops.rope import rope, rope_frequencies
from lineshaft_contract.ops.rows import embed, gather_rows, merge_rows
from lineshaft_contract.ops.spec import Numerics
from lineshaft_contract.problems import (
    EmbedProblem,
    LinearProblem,
    NormProblem,
    PointwiseProblem,
    RopeProblem,
    RopeScaling,
)

F64 = "float64"
POINTWISE = PointwiseProblem(dtype=F64)


def test_linear_is_a_sum_of_products_in_checkpoint_order() -> None:
    rng = np.random.default_rng(0)
    x, w, bias = rng.standard_normal((3, 5)), rng.standard_normal((4, 5)), rng.standard_normal(4)
    got = linear(LinearProblem(dtype=F64, n=4, k=5, bias=True), x, w, bias=bias)
    for t in range(3):
        for o in range(4):
            assert got[t, o] == pytest.approx(sum(x[t, i] * w[o, i] for i in range(5)) + bias[o], rel=1e-12)


def test_head_linear_multiplies_each_head_by_its_own_matrix() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 2, 5)), rng.standard_normal((2, 4, 5))
    got = head_linear(LinearProblem(dtype=F64, n=4, k=5, heads=2), x, w)
    np.testing.assert_allclose(got, np.einsum("thi,hoi->tho", x, w), rtol=1e-12)


def test_linear_refuses_adapters() -> None:
    with pytest.raises(ContractViolation, match="reserved"):
        linear(LinearProblem(dtype=F64, n=1, k=1), np.ones((1, 1)), np.ones((1, 1)), adapters=np.zeros(1))


def test_rms_norm_gives_unit_rms_and_eps_guards_zero_rows() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 64)) * 50
    problem = NormProblem(dtype=F64, width=64, eps=0.0)
    np.testing.assert_allclose(np.sqrt(np.mean(rms_norm(problem, x, np.ones(64)) ** 2, -1)), 1.0, rtol=1e-12)
    guarded = NormProblem(dtype=F64, width=4, eps=0.25)
    np.testing.assert_array_equal(rms_norm(guarded, np.zeros((1, 4)), np.ones(4)), np.zeros((1, 4)))
    one = rms_norm(guarded, np.full((1, 4), 3.0), np.array([1.0, 2.0, -1.0, 0.0]))
    np.testing.assert_allclose(one[0], np.array([1, 2, -1, 0]) * 3 / math.sqrt(9.25), rtol=1e-14)


def test_add_rms_norm_norms_the_rounded_sum() -> None:
    num = Numerics.of("bfloat16", "float32")
    problem = NormProblem(dtype="bfloat16", width=16, eps=1e-5)
    x, r = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(num.save(np.zeros(1)).dtype)
    normed, total = add_rms_norm(problem, x, r, np.ones(16), num=num)
    np.testing.assert_array_equal(total, (x.astype(np.float32) + r.astype(np.float32)).astype(total.dtype))
    np.testing.assert_array_equal(normed, rms_norm(problem, total, np.ones(16), num=num))


def test_gated_activations_take_the_gate_from_the_first_half() -> None:
    x = np.array([[0.0, 2.0, -3.0, 5.0, 7.0, 11.0]])
    silu = [g / (1 + math.exp(-g)) * u for g, u in ((0.0, 5.0), (2.0, 7.0), (-3.0, 11.0))]
    np.testing.assert_allclose(silu_mul(POINTWISE, x)[0], silu, rtol=1e-14)
    inner = [math.sqrt(2 / math.pi) * (g + 0.044715 * g**3) for g in (0.0, 2.0, -3.0)]
    gelu = [g / 2 * (1 + math.tanh(i)) * u for g, i, u in zip((0.0, 2.0, -3.0), inner, (5.0, 7.0, 11.0), strict=True)]
    np.testing.assert_allclose(gelu_mul(POINTWISE, x)[0], gelu, rtol=1e-14)


def test_silu_of_very_negative_gates_is_zero_not_nan() -> None:
    num = Numerics.of("float32", "float32")
    x = np.array([[-1000.0, -90.0, 1.0, 1.0]], np.float32)
    assert np.all(np.abs(silu_mul(POINTWISE, x, num=num)) < 1e-35)


def test_concat_and_add() -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.arange(4.0).reshape(2, 2)
    joined = concat(POINTWISE, [a, b], 1)
    np.testing.assert_array_equal(joined[:, :3], a)
    np.testing.assert_array_equal(joined[:, 3:], b)
    np.testing.assert_array_equal(add(POINTWISE, a, a), 2 * a)


def test_embed_is_zero_outside_the_shard() -> None:
    table = np.arange(1.0, 9.0).reshape(4, 2)
    table[0] = np.nan  # what is not asked for must not leak into rows outside
    ids = np.array([9, 10, 11, 13, 14, 0], np.int32)
    got = embed(EmbedProblem(dtype=F64, vocab=4, width=2), ids, table, np.array([10], np.int32))
    np.testing.assert_array_equal(got[[0, 4, 5]], np.zeros((3, 2)))
    np.testing.assert_array_equal(got[[2, 3]], table[[1, 3]])
    assert np.isnan(got[1]).all()


def test_gather_rows_and_merge_rows() -> None:
    x, embeds = np.arange(8.0).reshape(4, 2), np.arange(100.0, 104.0).reshape(2, 2)
    np.testing.assert_array_equal(gather_rows(POINTWISE, x, np.array([3, 0, 3])), x[[3, 0, 3]])
    merged = merge_rows(POINTWISE, x, embeds, np.array([-1, 1, -1, 0]))
    np.testing.assert_array_equal(merged, [x[0], embeds[1], x[2], embeds[0]])


# ---- rope -----------------------------------------------------------------------------------------------------------


def turned(x: Any, dim: int, base: float, position: int, interleaved: bool, divisor: float = 1.0) -> Any:
    """Rotary embedding as multiplication of complex numbers."""
    out = np.array(x, float)
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        z = complex(x[a], x[b]) * cmath.exp(1j * position / divisor * base ** (-2 * i / dim))
        out[a], out[b] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "head_dim"), [(8, 8), (4, 10)])
def test_rope_is_complex_multiplication_of_the_first_dim_values(interleaved: bool, dim: int, head_dim: int) -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((3, 2, head_dim)), rng.standard_normal((3, 1, head_dim))
    positions = np.array([0, 5, 8191], np.int32)
    problem = RopeProblem(dtype=F64, dim=dim, base=10000.0, head_dim=head_dim, interleaved=interleaved)
    for x, got in zip((q, k), rope(problem, q, k, positions), strict=True):
        for t, position in enumerate(positions.tolist()):
            for head in range(x.shape[1]):
                expected = turned(x[t, head], dim, 10000.0, position, interleaved)
                np.testing.assert_allclose(got[t, head], expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(got[0], x[0])
        np.testing.assert_array_equal(got[..., dim:], x[..., dim:])


def test_rope_scores_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 16)), rng.standard_normal((2, 1, 16))
    q[1], k[1] = q[0], k[0]
    problem = RopeProblem(dtype=F64, dim=16, base=10000.0)
    turned_q, _ = rope(problem, q, k, np.array([7, 107], np.int32))
    _, turned_k = rope(problem, q, k, np.array([3, 103], np.int32))
    assert turned_q[0, 0] @ turned_k[0, 0] == pytest.approx(turned_q[1, 0] @ turned_k[1, 0], rel=1e-10)


def test_rope_scaling() -> None:
    plain = rope_frequencies(RopeProblem(dtype=F64, dim=64, base=500000.0))
    np.testing.assert_allclose(plain, [500000.0 ** (-i / 32) for i in range(32)], rtol=1e-14)

    def scaled(**fields: Any) -> Any:
        return rope_frequencies(RopeProblem(dtype=F64, dim=64, base=500000.0, scaling=RopeScaling(**fields)))

    np.testing.assert_allclose(scaled(kind="linear", factor=4.0), plain / 4, rtol=1e-14)
    factors = tuple(float(i + 1) for i in range(32))
    np.testing.assert_allclose(scaled(freq_factors=factors), plain / np.array(factors), rtol=1e-14)
    with pytest.raises(ContractViolation, match="one per pair, 32"):
        scaled(freq_factors=(1.0, 2.0))
    with pytest.raises(ContractViolation, match="none, linear, llama3 or yarn"):
        scaled(kind="dynamic")
    with pytest.raises(ContractViolation, match="yarn over a context of 0"):
        scaled(kind="yarn")


def test_yarn_scaling_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """Bounds as published for 32 and 1 turns; the blend is linear in the pair's number between them."""
    scaling = RopeScaling(kind="yarn", factor=16.0, original_context=4096)
    problem = RopeProblem(dtype=F64, dim=128, base=10000.0, scaling=scaling)
    plain, got = rope_frequencies(RopeProblem(dtype=F64, dim=128, base=10000.0)), rope_frequencies(problem)
    turns = 4096 * plain / (2 * math.pi)
    fast, slow = int(np.sum(turns > 32)) - 1, int(np.sum(turns > 1))
    np.testing.assert_allclose(got[: fast + 1], plain[: fast + 1], rtol=1e-12)
    np.testing.assert_allclose(got[slow:], plain[slow:] / 16, rtol=1e-12)
    ratio = got[fast : slow + 1] / plain[fast : slow + 1]
    np.testing.assert_allclose(np.diff(ratio), (1 / 16 - 1) / (slow - fast), rtol=1e-9)


def test_llama3_scaling_follows_wavelengths() -> None:
    """Written with wavelengths, as the model card does; the reference counts turns."""
    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    problem = RopeProblem(dtype=F64, dim=128, base=500000.0, scaling=scaling)
    expected = []
    for i in range(64):
        frequency = 500000.0 ** (-i / 64)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            expected.append(frequency)
        elif wavelength > 8192 / 1.0:
            expected.append(frequency / 8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    got = rope_frequencies(problem)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert expected[0] == 1.0 and got[-1] == pytest.approx(500000.0 ** (-63 / 64) / 8)


def test_rope_angles_are_float32_in_the_reference_run_and_float64_in_the_exact_one() -> None:
    problem = RopeProblem(dtype="float32", dim=64, base=500000.0)
    x = np.ones((1, 1, 64), np.float32)
    at = np.array([131071], np.int32)
    exact, run = rope(problem, x, x, at)[0], rope(problem, x, x, at, num=Numerics.of("float32", "float32"))[0]
    worst = np.max(np.abs(exact - run))
    assert 1e-5 < worst < 5e-2
