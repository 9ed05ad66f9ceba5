"""The references that write, read, copy and quantize cache pages."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lineshaft_contract.ops.cache import (
    copy_pages,
    copy_slots,
    decode,
    encode,
    read_pages,
    to_codes,
    write_kv,
    write_pages,
)
from lineshaft_contract.ops.cases import Paging, paged_step
from lineshaft_contract.ops.spec import EXACT, StepArg
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.reference.session import ReferenceSession
from lineshaft_contract.steps import StepShape


def problem(**fields: Any) -> KVProblem:
    sizes: dict[str, Any] = {"kv_heads": 2, "qk_dim": 3, "v_dim": 2, "page_size": 4}
    return KVProblem(**{"dtype": "float32", "kv_dtype": "float32", **sizes, **fields})


def pages(p: KVProblem, count: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    out = {"k": rng.standard_normal((count, p.page_size, p.kv_heads, p.qk_dim)).astype(np.float32)}
    return {**out, "v": rng.standard_normal((count, p.page_size, p.kv_heads, p.v_dim)).astype(np.float32)}


def at_slots(*slots: int, group: int = 0) -> StepArg:
    shape = StepShape(tokens=len(slots), rows=1, pages=(1,) * (group + 1), logits=1, max_query=len(slots))
    return StepArg({f"slots.{group}": np.array(slots, np.int32)}, shape)


def test_write_stores_at_page_and_offset_and_leaves_the_rest_and_its_input_alone() -> None:
    p, held = problem(), pages(problem())
    before = {name: array.copy() for name, array in held.items()}
    k, v = np.full((2, 2, 3), 7.0, np.float32), np.full((2, 2, 2), 9.0, np.float32)
    out = write_kv(p, held, k, v, at_slots(4 * 4 + 3, 2 * 4))
    np.testing.assert_array_equal(out["k"][4, 3], k[0])
    np.testing.assert_array_equal(out["v"][2, 0], v[1])
    for name, array in out.items():
        changed = np.argwhere((array != before[name]).any((-1, -2))).tolist()
        assert changed == [[2, 0], [4, 3]]
        np.testing.assert_array_equal(held[name], before[name])


def test_the_null_page_takes_any_number_of_writes() -> None:
    p, held = problem(), pages(problem())
    out = write_kv(p, held, np.full((3, 2, 3), np.nan), np.full((3, 2, 2), np.nan), at_slots(0, 0, 3))
    np.testing.assert_array_equal(out["k"][1:], held["k"][1:])
    np.testing.assert_array_equal(out["v"][1:], held["v"][1:])


def test_a_cache_without_values_takes_none() -> None:
    p = problem(v_dim=0)
    out = write_kv(p, {"k": pages(problem())["k"]}, np.ones((1, 2, 3)), None, at_slots(5))
    assert set(out) == {"k"} and np.all(out["k"][1, 1] == 1)


def test_slots_are_those_of_the_caches_group() -> None:
    step = at_slots(6, group=1)
    wrong = StepArg({**step.arrays, "slots.0": np.array([9], np.int32)}, step.shape)
    out = write_kv(problem(group=1), pages(problem()), np.zeros((1, 2, 3)), np.zeros((1, 2, 2)), wrong)
    assert np.all(out["k"][1, 2] == 0) and np.all(out["k"][2, 1] != 0)


def test_read_then_write_moves_pages_unchanged() -> None:
    p, held = problem(), pages(problem())
    held["k"][3, 1] = np.nan
    ids = np.array([3, 1, 0, 0], np.int32)
    k, v = read_pages(p, held, ids)
    assert k.shape == (4, 4, 2, 3) and v.shape == (4, 4, 2, 2)
    moved = write_pages(p, {name: np.zeros_like(array) for name, array in held.items()}, ids, {"k": k, "v": v})
    np.testing.assert_array_equal(moved["k"][[1, 3]], held["k"][[1, 3]])
    assert not moved["k"][[2, 4]].any()


def test_copies_read_before_they_write() -> None:
    p, held = problem(), pages(problem())
    src, dst = np.array([1, 2, 0], np.int32), np.array([2, 1, 0], np.int32)
    swapped = copy_pages(p, held, src, dst)
    np.testing.assert_array_equal(swapped["k"][[1, 2]], held["k"][[2, 1]])
    np.testing.assert_array_equal(swapped["v"][3:], held["v"][3:])
    slots = copy_slots(p, held, np.array([4, 9], np.int32), np.array([9, 4], np.int32))
    np.testing.assert_array_equal(slots["k"][1, 0], held["k"][2, 1])
    np.testing.assert_array_equal(slots["k"][2, 1], held["k"][1, 0])
    np.testing.assert_array_equal(slots["k"][2, [0, 2, 3]], held["k"][2, [0, 2, 3]])


@pytest.mark.parametrize(("kv_dtype", "top"), [("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0), ("int8", 127.0)])
def test_codes_saturate_and_never_turn_into_nan(kv_dtype: str, top: float) -> None:
    codes = to_codes(np.array([1e9, -1e9, top, 0.0, -0.0]), kv_dtype).astype(np.float64)
    np.testing.assert_array_equal(codes, [top, -top, top, 0.0, 0.0])


def test_codes_round_to_even() -> None:
    np.testing.assert_array_equal(to_codes(np.array([0.5, 1.5, 2.5, -2.5]), "int8"), [0, 2, 2, -2])
    halfway = to_codes(np.array([17.0, 19.0]), "float8_e4m3fn").astype(float)  # steps of 2 between 16 and 32
    np.testing.assert_array_equal(halfway, [16.0, 20.0])
    assert to_codes(np.array([1.0]), "float8_e4m3fn").dtype == ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(
    ("scheme", "scales"),
    [("tensor", (2,)), ("head", (2, 2)), ("token_head", (2,)), ("block", (2,))],
)
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_what_is_encoded_is_decoded_within_half_a_step(scheme: str, scales: tuple[int, ...], kv_dtype: str) -> None:
    rng = np.random.default_rng(0)
    p = problem(qk_dim=64, kv_scheme=scheme, kv_dtype=kv_dtype, page_size=1)
    x = rng.standard_normal((6, 2, 64)) * np.exp(rng.standard_normal((6, 2, 1)))
    dynamic = scheme in ("token_head", "block")
    scale = np.ones(scales) if dynamic else np.full(scales, np.abs(x).max() / (127 if kv_dtype == "int8" else 448))
    parts = {name: values[:, None] for name, values in encode(p, "k", x, scale[0]).items()}
    assert set(parts) == ({"k", "k_scale"} if dynamic else {"k"})
    back = decode(p, "k", parts, np.arange(6), scale[0], EXACT)
    step = np.abs(x).max((1, 2) if not dynamic else 2) if kv_dtype == "int8" else 0
    bound = np.abs(x).max() / 127 if not dynamic else np.asarray(step)[..., None] / 127
    allowed = bound * 0.51 if kv_dtype == "int8" else np.abs(x) / 16 + np.abs(x).max() / 448 * 2**-9
    assert np.all(np.abs(back - x) <= allowed + 1e-9)


def test_a_token_of_zeros_is_stored_as_zeros() -> None:
    p = problem(qk_dim=32, kv_scheme="token_head", kv_dtype="int8")
    parts = encode(p, "k", np.zeros((1, 2, 32)), np.float32(1))
    assert not parts["k"].any() and not parts["k_scale"].any()


def test_the_step_builder_is_a_legal_step() -> None:
    """What the cases rest on: every index in range, live slots distinct, the null page never live."""
    paging = Paging(((1, 20), (5, 5), (0, 7), (3, 37), (0, 0), (2, 0)), page_size=8, padding=3)
    paged = paged_step(np.random.default_rng(0), paging)
    arrays, pool = paged.step.arrays, paged.live.size
    slots = arrays["slots.0"]
    assert slots.min() >= 0 and slots.max() < pool and arrays["page_table.0"].max() < paging.pages
    real = slots[slots >= 8]
    assert len(set(real.tolist())) == len(real) == 9
    assert not paged.live[0].any() and paged.live.sum() == 20 + 5 + 7 + 37
    assert paged.live.reshape(-1)[real].all()
    assert all(array.dtype == np.int32 for array in arrays.values())
    high = paged_step(np.random.default_rng(0), Paging(((1, 9),), page_size=4, pool=70000)).step.arrays["page_table.0"]
    assert high.max() > 65535


def test_the_reference_session_holds_the_scales_of_a_scheme() -> None:
    p = problem(qk_dim=64, v_dim=32, kv_scheme="block", kv_dtype="int8")
    session = ReferenceSession()
    session.alloc_caches([p], [3], "")
    sent = {name: np.full((1, *shape), 3, dtype) for name, (shape, dtype) in p.page_arrays.items()}
    session.write_pages(0, np.array([2]), sent)
    read = session.read_pages(0, np.array([2, 1]))
    assert list(read) == ["k", "v", "k_scale", "v_scale"]
    assert all((array[0] == 3).all() and not array[1].any() for array in read.values())
    assert sum(array[0].nbytes for array in read.values()) == p.page_bytes
    session.close()
