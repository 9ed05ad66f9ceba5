"""The uniform random numbers that sampling consumes, as a pure function of where they are used.

Knows nothing of batches: the same request draws the same numbers in any batch and after preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

PURPOSE_SAMPLE = 0
"""The draw that chooses the next token. Each further use of randomness takes a number of its own."""

_WORD = 0xFFFF_FFFF_FFFF_FFFF
_MULTIPLIER_0, _MULTIPLIER_2 = 0xD2E7_470E_E14C_6C93, 0xCA5A_8263_9512_1157
_WEYL_0, _WEYL_1 = 0x9E37_79B9_7F4A_7C15, 0xBB67_AE85_84CA_A73B


def draws(
    seeds: Sequence[int], forks: Sequence[int], positions: Sequence[int], purpose: int, index: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the uniform numbers in [0, 1) of n places: float32 [n], multiples of 2**-24.

    seeds: the requests' uint64; forks: which of its parallel samples each is; positions: the index, in prompt and
    output together, of the token that is drawn; purpose: `PURPOSE_SAMPLE`, ...; index: the draw's number within
    purpose. The layout is fixed: the top 24 bits of the first word of
    `numpy.random.Philox(key=[seed, fork], counter=[position, purpose, index, 0])`, position < 2**64 - 1.
    """
    n = len(seeds)
    key, counter = (_lanes(seeds), _lanes(forks)), (_lanes(positions) + _ones(n), purpose * _ones(n), index * _ones(n))
    words = np.frombuffer(_philox(key, counter, n).to_bytes(16 * n, "little"), np.uint64)[::2]
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _philox(key: tuple[int, int], counter: tuple[int, int, int], lanes: int) -> int:
    """Return the first output words of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").

    Every number holds a word of 64 bits for each lane, at multiples of 128 bits: one product of long integers makes the
    double-width products of all lanes. That takes a third of the time that arrays of uint64 do, which have no such
    product, and one number from a NumPy generator costs its construction, twice the time of these rounds. NumPy counts
    up before it draws: callers add 1 to the first word.
    """
    (word_0, word_1, word_2), word_3, (key_0, key_1) = counter, 0, key
    mask, weyl_0, weyl_1 = _WORD * _ones(lanes), _WEYL_0 * _ones(lanes), _WEYL_1 * _ones(lanes)
    for _ in range(10):
        product_0, product_2 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_2
        word_0, word_1 = ((product_2 >> 64) & mask) ^ word_1 ^ key_0, product_2 & mask
        word_2, word_3 = ((product_0 >> 64) & mask) ^ word_3 ^ key_1, product_0 & mask
        key_0, key_1 = (key_0 + weyl_0) & mask, (key_1 + weyl_1) & mask
    return word_0


def _lanes(words: Sequence[int]) -> int:
    wide = np.zeros((len(words), 2), np.uint64)
    wide[:, 0] = words
    return int.from_bytes(wide.tobytes(), "little")


@cache
def _ones(lanes: int) -> int:
    """1 in each lane."""
    return int.from_bytes((b"\1" + bytes(15)) * lanes, "little")
