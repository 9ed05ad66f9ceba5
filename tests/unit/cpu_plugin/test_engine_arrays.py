"""Arrays of a tape: the strides of slices and reshapes, against NumPy's, and which of them count tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import HostArray
from lineshaft_cpu.engine.arrays import Buffer, TapeArray, packed_strides, restrided, view_at


def held(*shape: int) -> tuple[TapeArray, HostArray]:
    """An array of the tape and NumPy's, over the same memory."""
    host = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return TapeArray(Buffer(host.nbytes, host), shape, "float32"), host


def same(array: TapeArray, host: HostArray) -> bool:
    """Whether both look at the same values of the same memory."""
    address = host.ctypes.data if host.size else array.address
    return array.address == address and np.array_equal(array.values(), host)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5, 1), (2, 3, 4, 5), (0, 3), (3, 0, 2)])
def test_packed_strides_are_numpys(shape: tuple[int, ...]) -> None:
    steps = np.zeros(shape, np.float32).strides
    sizes = [max(1, n) for n in shape]
    if 0 not in shape:
        assert [n * 4 for n in packed_strides(shape)] == list(steps)
    assert TapeArray(Buffer(4), sizes, "float32").dense


SLICES: list[Any] = [
    slice(None), slice(2, 5), (slice(None), slice(1, 3)), (slice(1, 4), slice(2, 4), slice(3, 8)), slice(3, 3),
    (slice(None), slice(0, 1)),
]  # fmt: skip


@pytest.mark.parametrize("index", SLICES)
def test_a_slice_looks_at_the_same_values(index: Any) -> None:
    array, host = held(6, 4, 8)
    found = array[index]
    assert found.shape == host[index].shape and same(found, host[index])
    assert found.dense == (host[index].flags.c_contiguous or found.size == 0)
    again = (slice(0, found.shape[0] // 2), slice(None), slice(1, found.shape[2]))
    assert same(found[again], host[index][again])


RESHAPES = [
    # of [6, 4, 8], the slice, the shape; whether strides can say it
    (slice(1, 3), (8, 8), True),
    ((slice(None), slice(0, 2)), (6, 16), True),
    ((slice(None), slice(0, 2)), (6, 2, 2, 4), True),
    ((slice(None), slice(0, 2)), (2, 3, 1, 16), True),
    ((slice(None), slice(0, 2)), (12, 8), False),
    ((slice(None), slice(0, 2)), (3, 32), False),
    ((slice(None), slice(None), slice(0, 4)), (24, 4), True),
    ((slice(None), slice(None), slice(0, 4)), (24, 2, 2), True),
    ((slice(None), slice(None), slice(0, 4)), (6, 16), False),
    ((slice(None), slice(1, 2), slice(2, 3)), (3, 2), True),
    ((slice(0, 1), slice(1, 2), slice(2, 6)), (4,), True),
    ((slice(0, 1), slice(1, 2), slice(2, 6)), (2, 1, 2), True),
]


@pytest.mark.parametrize(("index", "shape", "possible"), RESHAPES)
def test_a_slice_is_reshaped_where_strides_can_say_it(index: Any, shape: tuple[int, ...], possible: bool) -> None:
    array, host = held(6, 4, 8)
    if possible:
        assert same(array[index].reshape(*shape), host[index].reshape(shape))
        return
    with pytest.raises(ContractViolation, match="would need a copy"):
        array[index].reshape(*shape)


def test_strides_say_what_numpy_can_say_without_a_copy() -> None:
    rng = np.random.default_rng(3)
    said = 0
    for _ in range(2000):
        shape = tuple(int(n) for n in rng.choice((1, 2, 3, 4), 3))
        host = np.zeros(shape, np.int32)[:, : int(rng.integers(1, shape[1] + 1)), : int(rng.integers(1, shape[2] + 1))]
        factors = [int(n) for n in rng.permutation([f for n in host.shape for f in ((2, 2) if n == 4 else (n,))])]
        if sum(f > 1 for f in factors) and rng.random() < 0.5:
            factors = [int(np.prod(factors[:2])), *factors[2:]]
        view = host.view()
        try:
            view.shape = tuple(factors)
        except AttributeError:
            view = None  # type: ignore[assignment]
        found = restrided(host.shape, [step // 4 for step in host.strides], factors)
        assert (found is None) == (view is None), (host.shape, host.strides, factors)
        if found is not None:
            said += 1
            wanted = [step // 4 for n, step in zip(view.shape, view.strides, strict=True) if n > 1]
            assert [step for n, step in zip(factors, found, strict=True) if n > 1] == wanted
    assert said > 100
    assert restrided((4, 0), (8, 1), (0, 4)) is not None, "no values lie anywhere"


def test_views_of_nothing_and_of_one_value() -> None:
    array, host = held(6, 4)
    assert array[3:3].values().shape == (0, 4)
    assert same(array[5:6, 3:4].reshape(1), host[5:6, 3:4].reshape(1))
    assert view_at(host.ctypes.data, (), "float32") == 0


def test_rows_that_are_tokens_stay_so_while_the_first_dim_does() -> None:
    count, _ = held(1)
    array, _ = held(6, 4, 8)
    array.live = count
    assert array[:, 1:3].live is count
    assert array.reshape(6, 32).live is count
    assert array.reshape(6, 2, 2, 8)[:, :1].live is count
    assert array[0:6].live is count, "all rows"
    assert array[0:4].live is None and array.reshape(24, 8).live is None, "rows that are no tokens"


def test_a_kernel_for_other_arrays_is_told_what_to_set() -> None:
    array, _ = held(2, 2)
    for use in (lambda: array.double(), lambda: array.shape_as, lambda: array.numpy()):
        with pytest.raises(ContractViolation, match='backend_options engine = "torch"'):
            use()
    assert not hasattr(array, "__array_interface__")
