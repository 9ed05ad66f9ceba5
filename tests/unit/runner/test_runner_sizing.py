"""How memory is shared among cache groups."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lineshaft.runner.sizing import shares


def test_without_windows_every_group_gets_as_many_pages() -> None:
    assert shares(1000, [3, 2], [900, 900]) == [200, 200]
    assert shares(10**6, [3, 2], [900, 900]) == [900, 900]


def test_what_a_group_has_no_use_for_goes_to_the_others() -> None:
    assert shares(1000, [3, 2], [900, 40]) == [306, 40]
    assert shares(1000, [3, 2, 5], [900, 40, 60]) == [206, 40, 60]
    assert shares(1000, [3, 2], [900, 300]) == [200, 200]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 1000)), min_size=1, max_size=4),
)
def test_shares_fit_the_memory_and_leave_little_of_it(memory: int, groups: list[tuple[int, int]]) -> None:
    costs, most = [cost for cost, _ in groups], [limit for _, limit in groups]
    pages = shares(memory, costs, most)
    taken = sum(n * cost for n, cost in zip(pages, costs, strict=True))
    assert taken <= memory and all(n <= limit for n, limit in zip(pages, most, strict=True))
    assert pages == most or memory - taken < sum(costs)
    smallest = min(pages)
    assert all(n == limit for n, limit in zip(pages, most, strict=True) if n < max(pages) and n > smallest)
