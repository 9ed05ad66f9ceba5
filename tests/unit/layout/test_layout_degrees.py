"""Degrees are validated without a device, every broken rule at once."""

import pytest

from lineshaft.errors import LayoutError
from lineshaft.layout import Degrees, ModelShape

SMOLLM2 = ModelShape(q_heads=9, kv_heads=3, hidden=576, intermediate=1536, vocab=49152)


def test_coordinates_are_row_major_with_tp_innermost() -> None:
    degrees = Degrees(dp=2, tp=2)
    assert [(c.dp, c.tp) for c in map(degrees.coordinate, range(4))] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(LayoutError, match="rank 4"):
        degrees.coordinate(4)


def test_every_broken_rule_is_listed_at_once() -> None:
    with pytest.raises(LayoutError) as error:
        Degrees(pp=2, tp=2).validate(ModelShape(q_heads=9, kv_heads=3, hidden=576, intermediate=1535, vocab=10))
    message = str(error.value)
    assert "4 rule(s)" in message and "pp=2" in message
    assert "9 query heads" in message and "1535 intermediate" in message and "3 kv heads" in message


@pytest.mark.parametrize("axis", ["pp", "cp", "ep"])
def test_an_axis_that_this_version_does_not_run_is_refused(axis: str) -> None:
    with pytest.raises(LayoutError, match=f"{axis}=2"):
        Degrees(**{axis: 2}).validate(SMOLLM2)


def test_a_degree_below_one_is_refused() -> None:
    with pytest.raises(LayoutError, match="tp=0"):
        Degrees(tp=0).validate(SMOLLM2)


def test_smollm2_fits_three_ranks() -> None:
    Degrees(tp=3).validate(SMOLLM2)
