"""Packing of stored weights by C: bit for bit what the contract's `dequantize` gives, dense and in panels."""

from __future__ import annotations

import numpy as np
import pytest

from lineshaft.errors import MisshapenTensor, OutOfMemory
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.schemes import BLOCKS, PLAIN, dequantize
from lineshaft_contract.sessions import Packing
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_cpu import native
from lineshaft_cpu.engine.memory import Region, room
from lineshaft_cpu.engine.session import NativeSession
from lineshaft_cpu.engine.stored import dense, panels, unpack

LIBRARY = native.load("portable").library
HALVES = {"q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
"""Where the halves of a block are: scales and minima."""
PLAINS = ("float32", "bfloat16", "float16")
OTHERS = ("q5_k", "float64")
DTYPES = ("bfloat16", "float32")


def stored(scheme: str, rows: int, columns: int, seed: int = 0) -> Stored:
    """Random bytes of a scheme with finite scales, or random numbers of a dtype."""
    rng = np.random.default_rng(seed)
    if scheme not in BLOCKS:
        values = rng.standard_normal((rows, columns)).astype(numpy_dtype(scheme))
        return Stored(PLAIN, (rows, columns), {"data": values})
    block = BLOCKS[scheme]
    data = rng.integers(0, 256, (rows, columns // block.size, block.nbytes), np.uint8)
    for at in HALVES.get(scheme, (0, 2)):
        scales = rng.standard_normal(data.shape[:2]).astype(np.float16)
        data[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    return Stored(scheme, (rows, columns), {"data": data.reshape(rows, -1)})


def param(shape: tuple[int, ...], dtype: str, *parts: Stored, name: str = "w") -> Param:
    return Param(name, name, shape, dtype, {}, lambda checkpoint, coordinate: Local(parts))


def bits(array: HostArray) -> HostArray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def unpaneled(found: HostArray) -> HostArray:
    """The rows of panels, with what fills the last one."""
    return found.transpose(0, 2, 1, 3).reshape(len(found) * 32, -1)


def columns_of(scheme: str) -> int:
    return 3 * BLOCKS[scheme].size if scheme in BLOCKS else 301


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [*HALVES, *PLAINS, *OTHERS])
def test_parts_joined_within_a_panel_have_the_bits_of_the_reference(scheme: str, dtype: str) -> None:
    k = columns_of(scheme)
    parts = [stored(scheme, rows, k, rows) for rows in (5, 70, 1, 33)]
    n = sum(part.shape[0] for part in parts)
    wanted = np.concatenate([dequantize(part, dtype) for part in parts])
    of = param((n, k), dtype, *parts)
    assert (bits(dense(LIBRARY, of, Local(tuple(parts)))) == bits(wanted)).all()
    found = unpaneled(panels(LIBRARY, of, Local(tuple(parts))))
    assert (bits(found[:n, :k]) == bits(wanted)).all()
    assert not bits(found[n:]).any() and not bits(found[:, k:]).any()


@pytest.mark.parametrize("scheme", [*HALVES, *PLAINS])
def test_c_itself_takes_the_common_formats_and_no_other(scheme: str) -> None:
    part = stored(scheme, 3, columns_of(scheme))
    to = np.zeros(part.shape, np.float32)
    assert unpack(LIBRARY, part, to, "float32", 0, panels=False)
    for other in OTHERS:
        assert not unpack(LIBRARY, stored(other, 3, columns_of(other)), to, "float32", 0, panels=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 257), (31, 2), (32, 512), (33, 511), (64, 3)])
def test_odd_shapes(n: int, k: int, dtype: str) -> None:
    part = stored("float32", n, k)
    found = panels(LIBRARY, param((n, k), dtype, part), Local((part,)))
    assert found.shape == (-(-n // 32), -(-k // 2) if dtype == "bfloat16" else k, 32, 2 if dtype == "bfloat16" else 1)
    assert (bits(unpaneled(found)[:n, :k]) == bits(dequantize(part, dtype))).all()


def test_every_half_and_the_borders_of_rounding() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    halves = np.where(np.isnan(halves), np.float16("nan"), halves)
    single = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32
    )
    for values in (halves, single.view(np.float32)):
        part = Stored(PLAIN, values.shape, {"data": values})
        for dtype in DTYPES:
            found = dense(LIBRARY, param(values.shape, dtype, part), Local((part,)))
            with np.errstate(invalid="ignore"):
                wanted = dequantize(part, dtype)
            number = ~np.isnan(wanted)
            assert (np.isnan(found) == ~number).all() and (bits(found)[number] == bits(wanted)[number]).all()


def test_matrices_that_a_stack_is_made_of_and_views_with_gaps() -> None:
    experts = [stored("q8_0", 6, 64, seed) for seed in range(3)]
    found = dense(LIBRARY, param((3, 6, 64), "float32", *experts), Local(tuple(experts)))
    assert (bits(found) == bits(np.stack([dequantize(part, "float32") for part in experts]))).all()
    wide = np.random.default_rng(0).standard_normal((8, 20)).astype(np.float32)
    for cut in (wide[::2, 4:9], wide[:4, ::4]):
        part = Stored(PLAIN, cut.shape, {"data": cut})
        assert (dense(LIBRARY, param(cut.shape, "float32", part), Local((part,))) == cut).all()


def test_rows_of_another_length_are_refused() -> None:
    short = Stored("q8_0", (4, 64), {"data": np.zeros((4, 34), np.uint8)})
    assert not unpack(LIBRARY, short, np.zeros((4, 64), np.float32), "float32", 0, panels=False)
    with pytest.raises(MisshapenTensor, match="do not make up"):
        panels(LIBRARY, param((5, 64), "float32", short), Local((short,)))


def test_room_lies_in_the_region_that_a_thread_fills_and_is_kept_without_a_copy() -> None:
    region = Region()
    with region.filling():
        inside = room((3, 5), "bfloat16")
    outside = room((3, 5), "bfloat16")
    assert region.keep(inside) is inside and region.keep(inside.view(np.uint16)[1:]).base is not None
    kept = region.keep(outside)
    assert kept is not outside and region.keep(kept) is kept and (kept == outside).all()


def test_a_session_loads_what_is_shared_once_and_says_which_weight_has_no_memory() -> None:
    part = stored("q4_1", 40, 64)
    first, second = (param((40, 64), "float32", part, name=name) for name in ("first", "second"))
    tied = Param("tied", "first", (40, 64), "float32", {}, first.shard)
    session = NativeSession(native.load("portable"), 2)
    try:
        weights = session.load({"a": [first, tied], "b": second, "again": first}, None, {})  # type: ignore[arg-type]
        assert weights["a"][0].arrays["data"] is weights["a"][1].arrays["data"] and weights["again"] is weights["a"][0]
        assert weights["b"].arrays["data"] is not weights["a"][0].arrays["data"]
        assert [weights["a"][0].key, weights["a"][1].key, weights["b"].key] == [0, 1, 2]
        assert (weights["b"].arrays["data"] == dequantize(part, "float32")).all()

        def full(param: Param, local: Local) -> dict[str, HostArray]:
            raise MemoryError("none")

        with pytest.raises(OutOfMemory, match="weight second"):
            session.load({"a": first, "b": second}, None, {"second": Packing("full", full)})  # type: ignore[arg-type]
    finally:
        session.close()
