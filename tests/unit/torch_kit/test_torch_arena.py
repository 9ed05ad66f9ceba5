"""Buffers that live together never overlap in the arena."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft_torch.arena import ALIGNMENT, Lifetime, plan_offsets

LIVES = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 30), st.integers(0, 8)), max_size=40)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(LIVES)
def test_live_buffers_are_disjoint_aligned_and_inside(drawn: list[tuple[int, int, int]]) -> None:
    lives = [Lifetime(nbytes, first, first + length) for nbytes, first, length in drawn]
    offsets, total = plan_offsets(lives)
    for i, (a, start) in enumerate(zip(lives, offsets, strict=True)):
        assert start % ALIGNMENT == 0 and start + a.nbytes <= total
        for b, other in zip(lives[:i], offsets[:i], strict=True):
            together = a.first <= b.last and b.first <= a.last
            apart = start + a.nbytes <= other or other + b.nbytes <= start
            assert apart or not together
    peak = max((sum(_padded(a) for a in lives if a.first <= t <= a.last) for t in range(40)), default=0)
    assert peak <= total <= sum(_padded(a) for a in lives)


def _padded(life: Lifetime) -> int:
    return -(-life.nbytes // ALIGNMENT) * ALIGNMENT


def test_a_chain_needs_room_for_two() -> None:
    lives = [Lifetime(640, i, i + 1) for i in range(50)]
    assert plan_offsets(lives)[1] == 2 * 640


def test_the_tightest_gap_is_taken() -> None:
    lives = [
        Lifetime(640, 0, 0), Lifetime(64, 0, 9), Lifetime(128, 0, 0), Lifetime(64, 0, 9), Lifetime(100, 1, 2),
    ]  # fmt: skip
    assert plan_offsets(lives)[0][4] == 640 + 64
