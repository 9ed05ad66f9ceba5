"""Pages of codes in the native engine: every code, and what becomes one, as the contract has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.unit.cpu_plugin.taped import LEVELS, call, held, kernel, step

from lineshaft_contract.ops.cache import encode
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.problems import AttendProblem, KVProblem
from lineshaft_cpu import native
from lineshaft_cpu.engine.caches import PANELS
from lineshaft_cpu.engine.kernels.heads import KINDS
from lineshaft_cpu.engine.session import NativeSession

EXECUTED = ("float32", "bfloat16")
HEADS, SIZE = 2, 32


def problem_of(dtype: str, kv_dtype: str, scheme: str, dim: int) -> KVProblem:
    return KVProblem(
        dtype=dtype, kv_dtype=kv_dtype, kv_scheme=scheme, kv_heads=HEADS, qk_dim=dim, v_dim=dim, page_size=SIZE
    )


def numbers(dtype: str, tokens: int, dim: int) -> HostArray:
    """[T, H, dim] of all magnitudes: zeros, subnormal ones, infinities and NaN among them, and rows without those."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, HEADS, dim)) * 2.0 ** rng.integers(-20, 18, (tokens, HEADS, dim))
    x[0], x[1, :, :4] = 0.0, (np.inf, -np.inf, np.nan, -0.0)
    x[2, 0] *= 2.0**-120
    x[3:6] = np.linspace(-460, 460, 3 * HEADS * dim).reshape(3, HEADS, dim)  # ties of every code
    return x.astype(numpy_dtype(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EXECUTED)
@pytest.mark.parametrize("scheme", ["none", "tensor", "head", "token_head"])
@pytest.mark.parametrize("kv_dtype", KINDS)
def test_codes_are_those_of_the_contract_bit_by_bit(level: str, dtype: str, scheme: str, kv_dtype: str) -> None:
    problem, tokens = problem_of(dtype, kv_dtype, scheme, 96), 40
    x, slots = numbers(dtype, tokens, 96), np.random.default_rng(1).permutation(3 * SIZE)[:tokens].astype(np.int32)
    shape = {"none": None, "tensor": (2,), "head": (2, HEADS), "token_head": (2,)}[scheme]
    scales = None if shape is None else np.linspace(0.3, 1.7, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    session = NativeSession(native.load(level), 2)
    try:
        (cache,) = session.alloc_caches([problem], [3], PANELS)
        given = {} if scales is None else {"kv_scales": held(scales)}
        call(session, "cpu_write_kv_panels", problem, cache, held(x), held(x), step(slots=slots), **given)
        pages = session.read_pages(0, np.arange(3))
    finally:
        session.close()
    with np.errstate(all="ignore"):
        wanted: dict[str, HostArray] = {}
        for index, name in enumerate("kv"):
            wanted |= encode(problem, name, x, None if scales is None else scales[index])
    for name, values in wanted.items():
        found = pages[name].reshape(-1, *pages[name].shape[2:])[slots]
        same = found.view(np.uint8) == values.astype(found.dtype).view(np.uint8)
        if values.dtype != np.float32:
            lost = ~np.isfinite(x.astype(np.float32))  # int8 of what is no number is anything; fp8 of NaN any NaN
            rows = lost.any(-1, keepdims=True) if scheme == "token_head" else lost
            nan = np.isnan(found.astype(np.float32)) & np.isnan(values.astype(np.float32))
            same |= nan | (rows & (kv_dtype == "int8"))
        else:
            same = (found == values) | (np.isnan(found) & np.isnan(values))
        assert same.all(), (name, x[~same][:5] if same.shape == x.shape else values[~same][:5])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EXECUTED)
@pytest.mark.parametrize("q_heads", [2, 40])
@pytest.mark.parametrize("kv_dtype", KINDS)
def test_every_code_is_read_as_its_number(level: str, dtype: str, q_heads: int, kv_dtype: str) -> None:
    """One key to a row: the result is its value."""
    codes = np.arange(256, dtype=np.uint8).view(numpy_dtype(kv_dtype))
    kv = problem_of(dtype, kv_dtype, "none", 256)
    problem = AttendProblem(
        dtype=dtype, kv_dtype=kv_dtype, q_heads=q_heads, kv_heads=HEADS, qk_dim=256, v_dim=256, page_size=SIZE,
        scale=1.0, tokens=1, rows=1, pages=1, max_query=1,
    )  # fmt: skip
    session = NativeSession(native.load(level), 2)
    try:
        (cache,) = session.alloc_caches([kv], [2], PANELS)
        pages = {"k": np.zeros((1, SIZE, HEADS, 256), codes.dtype), "v": np.zeros((1, SIZE, HEADS, 256), codes.dtype)}
        pages["v"][0, 0] = codes
        pages["v"][0, 1:] = np.int8(-1).view(codes.dtype) if kv_dtype == "int8" else np.nan  # of no row
        session.write_pages(0, np.array([1]), pages)
        arrays = {"query_starts": [0, 1], "context_lens": [1], "page_table": [[1]]}
        given = {name: np.array(values, np.int32) for name, values in arrays.items()}
        q = np.ones((1, q_heads, 256), numpy_dtype(dtype))
        found = call(session, "cpu_attend_panels", problem, held(q), cache, step(**given)).values().astype(np.float32)
    finally:
        session.close()
    np.testing.assert_array_equal(found[0], np.broadcast_to(codes.astype(np.float32), (q_heads, 256)))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kv_scheme": "block"}, "not the parts of a head"),
        ({"kv_dtype": "float8_e4m3fnuz"}, "pages of int8, float8_e4m3fn, float8_e5m2 or the executed dtype bfloat16"),
        ({"kv_dtype": "bfloat16"}, "pages of int8"),
        ({"page_size": 16}, "a multiple of 32"),
    ],
)
def test_what_is_declined_has_a_reason(fields: dict[str, Any], why: str) -> None:
    given = {"dtype": "bfloat16", "kv_dtype": "int8", "kv_scheme": "token_head", "qk_dim": 64, "v_dim": 64} | fields
    sizes = {"kv_heads": 2, "page_size": 32} | fields
    for problem, name in (
        (KVProblem(**{**given, **sizes}), "cpu_write_kv_panels"),
        (AttendProblem(**{**given, **sizes}, q_heads=4, scale=1.0), "cpu_attend_panels"),
    ):
        assert why in str(kernel(name, LEVELS[0]).supports(problem))
