"""The uniform random numbers that sampling consumes, as a pure function of where they are used.

Knows nothing of batches: the same request draws the same numbers in any batch and after preemption.
"""

from __future__ import annotations

import numpy as np

PURPOSE_SAMPLE = 0
"""The draw that chooses the next token. Each further use of randomness takes a number of its own."""

_WORD = 0xFFFF_FFFF_FFFF_FFFF
_MULTIPLIER_0, _MULTIPLIER_2 = 0xD2E7_470E_E14C_6C93, 0xCA5A_8263_9512_1157
_WEYL_0, _WEYL_1 = 0x9E37_79B9_7F4A_7C15, 0xBB67_AE85_84CA_A73B


def draw(seed: int, fork: int, position: int, purpose: int, index: int) -> np.float32:
    """Return the uniform number in [0, 1) of one place: a float32 multiple of 2**-24.

    seed: the request's uint64; fork: which of its parallel samples; position: the index, in prompt and output
    together, of the token that is drawn; purpose: `PURPOSE_SAMPLE`, ...; index: the draw's number within purpose.
    The layout is fixed: the top 24 bits of the first word of
    `numpy.random.Philox(key=[seed, fork], counter=[position, purpose, index, 0])`, position < 2**64 - 1.
    """
    return np.float32((_philox(seed, fork, position, purpose, index) >> 40) * 2.0**-24)


def _philox(key_0: int, key_1: int, word_0: int, word_1: int, word_2: int) -> int:
    """Return the first output word of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").

    Written out because one number from a NumPy generator costs its construction, twice the time of these rounds.
    NumPy counts up before it draws: hence `word_0 + 1`.
    """
    word_0, word_3 = word_0 + 1, 0
    for _ in range(10):
        product_0, product_2 = word_0 * _MULTIPLIER_0, word_2 * _MULTIPLIER_2
        word_0, word_1 = (product_2 >> 64) ^ word_1 ^ key_0, product_2 & _WORD
        word_2, word_3 = (product_0 >> 64) ^ word_3 ^ key_1, product_0 & _WORD
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return word_0
