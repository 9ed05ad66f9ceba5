"""Kernels for tests of the compiler: a plain product, one with too many values for its registers, and a wrong one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a_ptr, b_ptr, c_ptr, size, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, sums: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), sums)
    for start in range(0, size, BK):
        a = tl.load(a_ptr + m[:, None] * size + (start + k)[None, :])
        b = tl.load(b_ptr + n[None, :] * size + (start + k)[:, None])
        total = tl.dot(a, b, total, out_dtype=sums)
    tl.store(c_ptr + m[:, None] * BN + n[None, :], total)


@triton.jit
def transposed(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    at, rows = tl.arange(0, BLOCK), tl.arange(0, 64)
    x = tl.load(x_ptr + rows[:, None] * width + at[None, :])
    y = tl.load(y_ptr + rows[:, None] * width + at[None, :])
    tl.store(x_ptr + rows[:, None] * width + at[None, :], tl.cumsum(x, 0) * tl.cumsum(y, 1) + x * y)


@triton.jit
def uneven(x_ptr):
    tl.store(x_ptr + tl.arange(0, 3), 1.0)


@triton.jit
def packed(a_ptr, b_ptr, c_ptr, size, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, kind: tl.constexpr):
    product(a_ptr, b_ptr, c_ptr, size, BM, BN, BK, tl.float32)
