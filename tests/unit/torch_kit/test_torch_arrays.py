"""Arrays cross between NumPy and torch without changing a bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from lineshaft.errors import ContractViolation
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_torch.arrays import DTYPES, dtype_name, from_host, host_view, to_host, torch_dtype


@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_pattern_survives_a_round_trip(name: str) -> None:
    dtype = numpy_dtype(name)
    patterns = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, 24 * dtype.itemsize).astype(np.uint8)
    array = patterns.view(dtype).reshape(4, 6)
    tensor = from_host(array)
    assert tensor.dtype == torch_dtype(name) and dtype_name(tensor.dtype) == name
    back = to_host(tensor)
    assert back.dtype == dtype and back.shape == (4, 6)
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_both_sides_read_the_same_numbers(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    array = np.asarray([0.0, -1.5, 0.0625, 48.0, 2.0**-6], dtype)
    assert from_host(array).float().tolist() == array.astype(np.float32).tolist()


def test_a_read_only_array_is_not_written_through() -> None:
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    from_host(array).fill_(1.0)
    assert not array.any()


def test_a_host_copy_is_private_and_a_view_is_shared() -> None:
    tensor = torch.zeros(3, dtype=torch.bfloat16)
    copy, view = to_host(tensor), host_view(tensor)
    tensor.fill_(2.0)
    assert copy.tolist() == [0, 0, 0] and view.tolist() == [2, 2, 2]


def test_strided_and_permuted_tensors_arrive_in_order() -> None:
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4).t()[1:3]
    assert to_host(tensor).tolist() == [[1, 5, 9], [2, 6, 10]]


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(ContractViolation, match="'int4'"):
        torch_dtype("int4")
