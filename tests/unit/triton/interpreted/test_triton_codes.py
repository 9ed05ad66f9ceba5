"""Narrow floats: what kernels store in pages, to the bit, and what the corrected interpreter makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lineshaft_contract.ops.cache import to_codes
from lineshaft_torch.arrays import from_host, to_host, torch_dtype
from lineshaft_triton.corrected_interpreter import correct_interpreter
from lineshaft_triton.kernels.codes import CODES, storable, stored, stored_view

EIGHT_BITS = [name for name in CODES if name.startswith("float8")]


@triton.jit
def store_kernel(
    out_ptr, x_ptr, N: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NAN: tl.constexpr,
    INF: tl.constexpr, UNSIGNED: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, stored(x, out_ptr.dtype.element_ty, TOP, MANTISSA, BIAS, NAN, INF, UNSIGNED))


@triton.jit
def cast_kernel(out_ptr, x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(out_ptr, a_ptr, b_ptr):
    at = tl.arange(0, 16)
    tile = at[:, None] * 16 + at[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)))


def floats(dtype: str) -> torch.Tensor:
    """float32 [4096]: random of all sizes, every value of `dtype` and what lies half way between two of them."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype)).float()
    known = codes[codes.isfinite()].sort().values
    halves = (known[1:] + known[:-1]) / 2
    odd = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 2.0**-126, 2.0**-149])
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(4096) * 2.0 ** rng.integers(-20, 20, 4096)
    return torch.cat([known, halves, halves * (1 + 1e-6), odd, from_host(drawn.astype(np.float32))])[:4096]


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to the bit, but for the kind of a NaN."""
    equal = got.view(torch.uint8) == wanted.view(torch.uint8)
    return bool((equal | (got.float().isnan() & wanted.float().isnan())).all())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_codes_of_eight_bits(dtype: str) -> None:
    x = floats(dtype)
    out = torch.empty(4096, dtype=torch_dtype(dtype))
    store_kernel[(1,)](stored_view(out), x, N=4096, **CODES[dtype].constexprs)
    assert same(out, from_host(to_codes(to_host(x), dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_beyond_sixteen_bits_saturate(dtype: str) -> None:
    x = torch.tensor([3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 65520.0, 1.0, -0.0])
    out = torch.empty(8, dtype=torch_dtype(dtype))
    store_kernel[(1,)](out, x, N=8, **CODES[dtype].constexprs)
    wanted = from_host(to_codes(to_host(x), dtype))
    assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0)) and out.isnan().sum() == 1


@pytest.mark.parametrize("dtype", ["bfloat16", *EIGHT_BITS])
def test_interpreted_casts_round_to_even(dtype: str) -> None:
    x = torch.linspace(-3, 3, 4096)
    out = torch.empty(4096, dtype=torch_dtype(dtype))
    cast_kernel[(1,)](out, x, N=4096)
    assert same(out, x.to(out.dtype)) if out.itemsize == 1 else torch.equal(out, x.to(out.dtype))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_interpreted_codes_are_read_as_they_are(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype))
    out = torch.empty(256)
    cast_kernel[(1,)](out, codes, N=256)
    assert torch.equal(out.nan_to_num(1e9), codes.float().nan_to_num(1e9))


def test_interpreted_products_of_bfloat16() -> None:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](out, a, b)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_correcting_twice_changes_nothing() -> None:
    from triton.runtime import interpreter

    before: Any = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float
    correct_interpreter()
    assert before == (interpreter.InterpreterBuilder.create_dot, interpreter._convert_float)


def test_what_cannot_be_stored_is_declined() -> None:
    assert storable("bfloat16", "float8_e5m2") is None
    assert "does not store bfloat16 as int8" in str(storable("bfloat16", "int8"))
    assert "float64" in str(storable("float64", "float64"))
