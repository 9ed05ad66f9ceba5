"""The memory check says by how much, and shared parameters count once a packing."""

from __future__ import annotations

import pytest

from lineshaft.errors import MisshapenTensor, OutOfMemory
from lineshaft.weights.memory import check_fits, local_bytes, repacked
from lineshaft_contract.schemes import as_dtype
from lineshaft_contract.weights import Local, Param

GIB = 1 << 30


def param(name: str, source: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> Param:
    return Param(name, source, shape, dtype, {}, lambda checkpoint, coordinate: Local(()))


def test_tied_parameters_count_once_a_packing() -> None:
    embed, head, extra = (param(name, "table", (100, 8)) for name in ("embed", "head", "extra"))
    norm = param("norm", "norm", (8,), "float32")
    params, table = [embed, head, extra, norm], 100 * 8 * 2
    assert local_bytes(params, {}) == table + 8 * 4
    assert repacked(params, {}) == []
    layouts = {"embed": "dense", "head": "tiles", "extra": "dense", "norm": "dense"}
    assert local_bytes(params, layouts) == 2 * table + 8 * 4
    said = f"embed and head and extra hold one tensor in 2 packings: dense, tiles (+{table} bytes)"
    assert repacked(params, layouts) == [said]


def test_what_differs_in_dtype_shares_no_memory() -> None:
    wide, narrow = param("wide", "table", (100, 8), "float32"), param("narrow", "table", (100, 8))
    assert local_bytes([wide, narrow], {}) == 100 * 8 * (4 + 2)


def test_what_fits_and_what_nobody_knows_passes() -> None:
    check_fits({"weights": GIB}, GIB)
    check_fits({"weights": GIB}, None)


def test_what_does_not_fit_says_by_how_much_and_what_to_do() -> None:
    with pytest.raises(OutOfMemory) as caught:
        check_fits({"weights": 3 * GIB, "caches": GIB // 2}, 2 * GIB)
    message = str(caught.value)
    assert message.startswith(
        "weights 3.00 GiB + caches 0.50 GiB need 3.50 GiB but 2.00 GiB are free: 1.50 GiB too much"
    )
    assert "use a smaller" in message and "\n" not in message


def test_one_byte_too_much_is_too_much() -> None:
    with pytest.raises(OutOfMemory, match="1 bytes too much"):
        check_fits({"weights": GIB + 1}, GIB)


def test_dtype_names() -> None:
    assert as_dtype("bfloat16").itemsize == 2 and as_dtype("float8_e4m3fn").itemsize == 1
    with pytest.raises(MisshapenTensor, match="'floaty'"):
        as_dtype("floaty")
