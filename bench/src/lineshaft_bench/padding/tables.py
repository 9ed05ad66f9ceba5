"""The table of so many sizes that pads least, by dynamic programming, and the powers of two to compare it with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lineshaft.errors import InvalidValue
from lineshaft.runner.buckets import padding_share, powers_of_two
from lineshaft_bench.padding.lengths import Lengths
from lineshaft_contract.sessions import HostArray

MOST_BUCKETS = 128
"""Of a table: each is a program to compile."""
MOST_SIZES = 1 << 17
"""Different lengths among which a table is chosen."""


@dataclass(frozen=True)
class Choice:
    """The best table and the powers of two at the same count, each with its share of positions that are padding."""

    table: tuple[int, ...]
    share: float
    powers: tuple[int, ...]
    powers_share: float

    @property
    def ratio(self) -> float:
        """The padding share of the table over that of the powers of two; 1 where neither pads."""
        return self.share / self.powers_share if self.powers_share else 1.0


def choose(lengths: Lengths, buckets: int, multiple: int = 1) -> Choice:
    """The best table of so many buckets beside powers of two. Raises InvalidValue."""
    table = best_table(lengths.weights, buckets, multiple)
    powers = powers_table(table[-1], buckets, multiple)
    return Choice(table, padding_share(table, lengths.weights), powers, padding_share(powers, lengths.weights))


def powers_table(largest: int, buckets: int, multiple: int = 1) -> tuple[int, ...]:
    """The last of `multiple` times 1, 2, 4, … and `largest`, at most so many; `largest` is a multiple."""
    return powers_of_two(multiple, largest)[-buckets:]


def best_table(weights: HostArray, buckets: int, multiple: int = 1) -> tuple[int, ...]:
    """The ascending table of so many multiples of `multiple` that needs the fewest positions, and holds every length.

    weights: float64 [L], how often lengths 1 … L occur. A cost that is linear in the tokens of a bucket has the same
    best table. Raises InvalidValue for more buckets than there are different lengths, or more than MOST_BUCKETS.
    """
    sizes, share = candidates(weights, multiple)
    if not 1 <= buckets <= min(len(sizes), MOST_BUCKETS):
        rounded = f", rounded up to multiples of {multiple}" if multiple > 1 else ""
        raise InvalidValue(
            f"buckets = {buckets}: there are {len(sizes)} different lengths{rounded}; "
            f"give a number from 1 to {min(len(sizes), MOST_BUCKETS)}"
        )
    upto = np.r_[0.0, np.cumsum(share)]
    needed = np.r_[0.0, sizes * upto[1:]]  # positions that the first j sizes need in one bucket
    before = []
    for filled in range(1, buckets):
        needed, chosen = one_more(needed, sizes, upto, filled)
        before.append(chosen)
    at, table = len(sizes), [int(sizes[-1])]
    for chosen in reversed(before):
        at = chosen[at]
        table.append(int(sizes[at - 1]))
    return tuple(reversed(table))


def candidates(weights: HostArray, multiple: int) -> tuple[HostArray, HostArray]:
    """The sizes that a best table is made of, ascending, and how often each is what a length is rounded up to: the
    lengths that occur, and the longest. Raises InvalidValue for too many."""
    occurs = weights > 0
    occurs[-1] = True
    lengths = np.flatnonzero(occurs) + 1
    sizes, which = np.unique(-(-lengths // multiple) * multiple, return_inverse=True)
    if len(sizes) > MOST_SIZES:
        least = -(-len(weights) // MOST_SIZES)
        raise InvalidValue(
            f"{len(sizes)} different lengths: at most {MOST_SIZES} can be told apart; round them up with a multiple of "
            f"{least} or more"
        )
    return sizes, np.bincount(which, weights[lengths - 1])


def one_more(needed: HostArray, sizes: HostArray, upto: HostArray, filled: int) -> tuple[HostArray, HostArray]:
    """Positions that the first j sizes need with one bucket more than `filled`, and how many sizes lie below its last.

    That split grows with j, since larger sizes cost more. So half of the splits bound the others: all middles of a
    level of bisection are found at once, each by trying the splits between those of its neighbours.
    """
    count = len(sizes)
    most, split = np.full(count + 1, np.inf), np.zeros(count + 1, np.int64)
    first, last, low, high = (np.array([n]) for n in (filled + 1, count, filled, count - 1))
    while len(first):
        middle = (first + last) // 2
        tries = np.minimum(high, middle - 1) - low + 1
        begins = np.cumsum(tries) - tries
        at = np.arange(tries.sum()) + np.repeat(low - begins, tries)
        ends = np.repeat(middle, tries)
        positions = needed[at] + sizes[ends - 1] * (upto[ends] - upto[at])
        most[middle] = least = np.minimum.reduceat(positions, begins)
        hits = np.flatnonzero(positions == np.repeat(least, tries))
        split[middle] = best = at[hits[np.searchsorted(hits, begins)]]
        first, last = np.r_[first, middle + 1], np.r_[middle - 1, last]
        low, high = np.r_[low, best], np.r_[best, high]
        left = first <= last
        first, last, low, high = first[left], last[left], low[left], high[left]
    return most, split
