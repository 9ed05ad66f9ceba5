"""Attention over pages of panels where numbers are none, too large, or nobody's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.unit.cpu_plugin.taped import LEVELS, call, held, step

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.problems import AttendProblem, KVProblem
from lineshaft_cpu import native
from lineshaft_cpu.engine.caches import PANELS
from lineshaft_cpu.engine.session import NativeSession

EXECUTED = ("float32", "bfloat16")
SIZE, DIM, GROUPS = 32, 64, (1, 20)


def attend(
    level: str, q: HostArray, k: HostArray, v: HostArray, window: int = 0, scale: float = 0.125, sinks: Any = None
) -> HostArray:
    """Of the last token of one row: q [1, Hq, D], keys and values of one head [n, D] -> [Hq, D] in float32."""
    dtype, count = q.dtype.name, -(-len(k) // SIZE)
    sizes = {"dtype": dtype, "kv_dtype": dtype, "kv_heads": 1, "qk_dim": DIM, "v_dim": DIM, "page_size": SIZE}
    problem = AttendProblem(
        **sizes, q_heads=q.shape[1], scale=scale, window=window, tokens=1, rows=1, pages=count, max_query=1,
        sinks=sinks is not None,
    )  # fmt: skip
    padded = {name: np.zeros((count * SIZE, 1, DIM), q.dtype) for name in "kv"}
    padded["k"][: len(k), 0], padded["v"][: len(v), 0] = k, v
    session = NativeSession(native.load(level), 2)
    try:
        (cache,) = session.alloc_caches([KVProblem(**sizes)], [count + 1], PANELS)
        pages = {name: array.reshape(count, SIZE, 1, DIM) for name, array in padded.items()}
        session.write_pages(0, np.arange(count) + 1, pages)
        arrays = {"query_starts": [0, 1], "context_lens": [len(k)], "page_table": [np.arange(count) + 1]}
        at = step(**{name: np.array(values, np.int32) for name, values in arrays.items()})
        given = {} if sinks is None else {"sinks": held(sinks)}
        out = call(session, "cpu_attend_panels", problem, held(q), cache, at, **given)
        result: HostArray = out.values().astype(np.float32)[0]
        return result
    finally:
        session.close()


def random(dtype: str, heads: int, keys: int) -> tuple[HostArray, HostArray, HostArray]:
    rng = np.random.default_rng(keys)
    q, k, v = (rng.standard_normal(shape) for shape in ((1, heads, DIM), (keys, DIM), (keys, DIM)))
    return q.astype(numpy_dtype(dtype)), k.astype(numpy_dtype(dtype)), v.astype(numpy_dtype(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EXECUTED)
@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize("keys", [1, 33, 600])
def test_scores_that_are_no_numbers_make_results_that_are_none(level: str, dtype: str, heads: int, keys: int) -> None:
    q, k, v = random(dtype, heads, keys)
    q[0, -1, 3] = np.nan
    found = attend(level, q, k, v)
    assert np.isnan(found[-1]).all() and np.isfinite(found[:-1]).all()
    k[0] = np.nan
    assert np.isnan(attend(level, q, k, v)).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EXECUTED)
@pytest.mark.parametrize("heads", GROUPS)
@pytest.mark.parametrize(("keys", "window"), [(20, 7), (32, 1), (90, 40), (600, 77), (600, 64)])
def test_what_lies_before_a_window_is_not_read(level: str, dtype: str, heads: int, keys: int, window: int) -> None:
    q, k, v = random(dtype, heads, keys)
    wanted = attend(level, q, k, v, window)
    k[: keys - window], v[: keys - window] = np.nan, np.inf
    assert attend(level, q, k, v, window).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EXECUTED)
@pytest.mark.parametrize("heads", GROUPS)
def test_of_scores_however_large_the_largest_counts(level: str, dtype: str, heads: int) -> None:
    q, k, v = random(dtype, heads, 600)
    best = (q[0].astype(np.float64) @ k.astype(np.float64).T).argmax(1)
    for scale in (1e3, 1e7, 1.234567e8, 1e9, 3.3e12):
        found = attend(level, q, k, v, scale=scale)
        np.testing.assert_allclose(found, v[best].astype(np.float32), rtol=1e-5)


def test_sinks_of_another_dtype_are_refused() -> None:
    q, k, v = random("bfloat16", 2, 9)
    with pytest.raises(ContractViolation, match="sinks or scales are float32; this kernel takes them in bfloat16"):
        attend(LEVELS[0], q, k, v, sinks=np.zeros(2, np.float32))
