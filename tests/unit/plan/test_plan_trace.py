"""The abstract arrays of a trace allow what the contract allows and nothing else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lineshaft.errors import ContractViolation
from lineshaft.plan.trace import AbstractArray, Workspace, dispatch_key
from lineshaft_contract.reference.session import ValueArray
from lineshaft_contract.steps import ArraySpec


def both(shape: tuple[int, ...]) -> list[Any]:
    return [AbstractArray(ArraySpec(shape, "float32"), "x"), ValueArray(np.zeros(shape, np.float32))]


@pytest.mark.parametrize("x", both((4, 6)))
def test_shapes_reshapes_and_static_slices_are_allowed(x: Any) -> None:
    assert x.shape == (4, 6)
    assert x.reshape(4, 2, 3).shape == (4, 2, 3)
    assert x[:, 2:5].shape == (4, 3) and x[1:].shape == (3, 6)


FORBIDDEN: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda x: x + 1,
    "reflected arithmetic": lambda x: 2 * x,
    "comparison": lambda x: x < 1,
    "truth": bool,
    "iteration": list,
    "length": len,
    "dtype": lambda x: x.dtype,
    "item": lambda x: x.item(),
    "device": lambda x: x.device,
    "integer index": lambda x: x[0],
    "strided slice": lambda x: x[::2],
    "negative bound": lambda x: x[:-1],
    "bound past the end": lambda x: x[:7],
    "NumPy bound": lambda x: x[: np.int64(2)],
    "too many indices": lambda x: x[:, :, :],
    "inferred size": lambda x: x.reshape(-1, 2),
    "wrong size": lambda x: x.reshape(5, 5),
    "NumPy size": lambda x: x.reshape(np.int64(24)),
}


@pytest.mark.parametrize("x", both((4, 6)), ids=["abstract", "reference"])
@pytest.mark.parametrize("what", FORBIDDEN)
def test_everything_else_is_a_violation(x: Any, what: str) -> None:
    with pytest.raises(ContractViolation):
        FORBIDDEN[what](x)


def test_calls_of_one_name_are_told_apart_by_shape_and_static_arguments() -> None:
    a, b = both((4, 6))[0], both((2, 6))[0]
    assert dispatch_key((a, "tp"), {}) == dispatch_key((both((4, 6))[1], "tp"), {})
    assert len({dispatch_key((x, axis), {}) for x in (a, b) for axis in ("tp", "dp")}) == 4


def test_the_workspace_counts_a_result_until_its_last_view_is_gone() -> None:
    workspace = Workspace()
    first = workspace.hold(ArraySpec((4, 6), "bfloat16"), "x")
    view = first[:2].reshape(12)
    second = workspace.hold(ArraySpec((3,), "float32"), "x")
    assert (workspace.now, workspace.most) == (48 + 12, 48 + 12)
    del first
    assert workspace.now == 48 + 12 and view.shape == (12,)
    del view
    assert (workspace.now, workspace.most) == (12, 48 + 12)
    del second
    assert workspace.now == 0
