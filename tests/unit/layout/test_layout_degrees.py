"""Degrees are validated without a device, every broken rule at once; heads and vocabulary are shared out exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(
    kv=st.sampled_from([1, 2, 3, 4, 8]), group=st.sampled_from([1, 2, 3, 4]), tp=st.sampled_from([1, 2, 3, 4, 6, 8, 16])
)
def test_each_query_head_meets_its_own_kv_head(kv: int, group: int, tp: int) -> None:
    shape = ModelShape(q_heads=kv * group, kv_heads=kv, hidden=8, intermediate=48, vocab=10)
    degrees = Degrees(tp=tp)
    try:
        degrees.validate(shape)
    except LayoutError:
        return
    owned = []
    for rank in range(tp):
        share = degrees.heads(shape, rank)
        q, local_kv = share.q_stop - share.q_start, share.kv_stop - share.kv_start
        owned += range(share.q_start, share.q_stop)
        for i in range(q):
            assert share.kv_start + i // (q // local_kv) == (share.q_start + i) // group
    assert owned == list(range(shape.q_heads))


@given(vocab=st.integers(1, 1000), tp=st.integers(1, 16))
def test_padding_the_vocabulary_adds_less_than_one_row_a_rank(vocab: int, tp: int) -> None:
    padded = Degrees(tp=tp).padded_vocab(vocab)
    assert padded % tp == 0 and 0 <= padded - vocab < tp
