"""How long outputs are, learned from requests that ended: histograms by tenant and length of prompt.

Knows numbers and the bytes that name a tenant; not requests.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

ENOUGH = 8
"""Outputs that a histogram must have seen before it is asked."""
KEPT = 512
"""Outputs after which a histogram counts its past by half, so that it follows what changes."""
MOST = 1024
"""Histograms kept; of more, the one made first is forgotten, since anyone can invent tenants."""


class OutputLengths:
    """Quantiles of output lengths, to within a fifth: bins are two to a power of two."""

    def __init__(self) -> None:
        self._bins: dict[Hashable, dict[int, float]] = {}

    def add(self, tenant: bytes, prompt: int, output: int) -> None:
        """Learn from an output of so many tokens, at least 1, to a prompt of so many."""
        for key in self._keys(tenant, prompt):
            bins = self._bins.setdefault(key, {})
            bins[_bin(output)] = bins.get(_bin(output), 0.0) + 1
            if sum(bins.values()) > KEPT:
                self._bins[key] = {number: count / 2 for number, count in bins.items()}
        while len(self._bins) > MOST:
            del self._bins[next(key for key in self._bins if key != ())]

    def quantile(self, tenant: bytes, prompt: int, share: float) -> int | None:
        """Return the length that this share of such outputs does not pass; None while too few are known.

        Asked are outputs of the same tenant to prompts of like length, else of the same tenant, else all.
        """
        for key in self._keys(tenant, prompt):
            bins = self._bins.get(key, {})
            left = share * sum(bins.values())
            if sum(bins.values()) >= ENOUGH:
                for number in sorted(bins):
                    left -= bins[number]
                    if left <= 0:
                        return _middle(number)
        return None

    def _keys(self, tenant: bytes, prompt: int) -> Iterator[Hashable]:
        yield tenant, prompt.bit_length()
        yield tenant
        yield ()


def _bin(length: int) -> int:
    """Two bins to a power of two: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, …"""
    power = length.bit_length() - 1
    return 2 * power + (length >> power - 1 & 1 if power else 0)


def _middle(number: int) -> int:
    """A length in the middle of a bin."""
    power, upper = divmod(number, 2)
    width = max(1, 1 << power >> 1)
    return (1 << power) + upper * width + (width - 1) // 2
