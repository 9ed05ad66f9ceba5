"""draws: fixed values, NumPy's generator as the reference, and nothing but the arguments matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.sampling.draw import PURPOSE_SAMPLE, draws

TOP = 2**64 - 1


def draw(seed: int, fork: int, position: int, purpose: int, index: int) -> np.float32:
    number: np.float32 = draws([seed], [fork], [position], purpose, index)[0]
    return number


# (seed, fork, position, purpose, index) -> number * 2**24. These never change: a seed must mean the same for ever.
VECTORS = [
    ((0, 0, 0, 0, 0), 193722),
    ((0, 0, 1, 0, 0), 8428531),
    ((1, 0, 0, 0, 0), 5093026),
    ((0, 1, 0, 0, 0), 13645816),
    ((0, 0, 0, 1, 0), 3554413),
    ((0, 0, 0, 0, 1), 10798432),
    ((42, 0, 17, 0, 0), 7448744),
    ((42, 3, 17, 0, 2), 5149548),
    ((0xDEADBEEF, 1, 131071, 0, 0), 12869740),
    ((TOP, TOP, TOP - 1, TOP, TOP), 3571903),
]


@pytest.mark.parametrize(("place", "expected"), VECTORS)
def test_vectors(place: tuple[int, int, int, int, int], expected: int) -> None:
    assert draw(*place) == np.float32(expected * 2.0**-24)


uint64 = st.integers(0, TOP)


@settings(derandomize=True, max_examples=300)
@given(uint64, uint64, st.integers(0, TOP - 1), uint64, uint64)
def test_equals_the_documented_numpy_generator(seed: int, fork: int, position: int, purpose: int, index: int) -> None:
    key = np.array([seed, fork], np.uint64)
    counter = np.array([position, purpose, index, 0], np.uint64)
    word = int(np.random.Philox(key=key, counter=counter).random_raw())
    assert draw(seed, fork, position, purpose, index) == np.float32((word >> 40) / 2**24)


@settings(derandomize=True, max_examples=100)
@given(st.lists(st.tuples(uint64, uint64, st.integers(0, TOP - 1)), max_size=40), uint64, uint64)
def test_many_at_once_are_the_same(places: list[tuple[int, int, int]], purpose: int, index: int) -> None:
    columns = list(zip(*places, strict=True)) or [(), (), ()]
    expected = [draw(*place, purpose, index) for place in places]
    assert draws(*columns, purpose, index).tolist() == expected  # type: ignore[call-arg]


def test_other_draws_do_not_matter() -> None:
    places = [(seed, 0, position, PURPOSE_SAMPLE, 0) for seed in range(5) for position in range(20)]
    forward = {place: draw(*place) for place in places}
    backward = {place: draw(*place) for place in reversed(places)}
    assert forward == backward


def test_each_argument_matters() -> None:
    base = (1, 2, 3, 4, 5)
    others = [(*base[:i], base[i] + 1, *base[i + 1 :]) for i in range(5)]
    assert len({float(draw(*place)) for place in (base, *others)}) == 6


def test_float32_below_one_and_uniform() -> None:
    values = np.array([draw(9, 0, position, PURPOSE_SAMPLE, 0) for position in range(4000)])
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=16, range=(0, 1))[0]
    chi_square = float(((counts - 250.0) ** 2 / 250.0).sum())
    assert chi_square < 37.7  # 15 degrees of freedom: exceeded once in a thousand seeds, and the seed is fixed


def test_largest_draw_is_below_one() -> None:
    assert np.float32((2**24 - 1) * 2.0**-24) < 1
