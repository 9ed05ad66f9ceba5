"""Products of quantized operands: codes of activations are the contract's to the bit, and sums of int8 codes exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lineshaft_contract.ops.quantize import ACTIVATION_SCHEMES, quantize_rows
from lineshaft_contract.weights import Weight
from lineshaft_torch.arrays import from_host, torch_dtype
from lineshaft_torch.kernels.linear import activated_linear, quantized_rows


def rows_of_every_kind(rng: np.random.Generator) -> Any:
    """float32 [60, 96]: rows of all sizes, of halves, of zeros, of next to nothing, and what is not finite."""
    x = rng.standard_normal((60, 96)) * 2.0 ** rng.uniform(-130, 100, (60, 1))
    x[0], x[1, 3], x[2, 4], x[3] = 0, np.nan, -np.inf, 1e-44
    x[4], x[5] = rng.integers(-20, 20, (2, 96)) + 0.5
    x[4, 0], x[5, 0] = 127, 448
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_codes_and_scales_of_activations_are_those_of_the_rule(scheme: str, dtype: str) -> None:
    x = from_host(rows_of_every_kind(np.random.default_rng(0))).to(torch_dtype(dtype))
    codes, scales = quantized_rows(x, scheme)
    expected, steps = quantize_rows(x.double().numpy(), scheme)
    np.testing.assert_array_equal(codes.numpy(), expected.astype(np.float32))
    np.testing.assert_array_equal(scales.numpy()[:, 0], steps)
    assert np.isnan(steps).any() and (expected.astype(float) < 0).any()


@pytest.mark.parametrize("k", [1024, 1025, 5000])
def test_sums_of_int8_codes_are_exact_however_large(k: int) -> None:
    """Odd codes of one sign: their products are odd, and in float32 their sum would lose its last bits."""
    rng = np.random.default_rng(0)
    x = 127.0 - 2 * rng.integers(0, 3, (2, k))
    x[:, 0] = 127
    codes = (127 - 2 * rng.integers(0, 3, (3, k))).astype(np.int8)
    weight = Weight(0, "w", {}, "int8_rows", {"q": from_host(codes), "scale": torch.ones(3)})
    sums = x.astype(np.int64) @ codes.T.astype(np.int64)
    assert k < 1040 or sums.min() > 2**24
    got = activated_linear("w8a8_int8", from_host(x.astype(np.float32)), weight)
    np.testing.assert_array_equal(got.numpy(), sums.astype(np.float32))
