"""Chained hashes that name a whole page by its tokens and by everything before them.

Knows tokens and page sizes only, not which page holds what.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_DIGEST_SIZE = 32


class PrefixHashes:
    """The page hashes of one sequence, grown on demand: one chain per page size.

    Equal hashes mean equal salt, equal page tokens and equal tokens before them: 256 bits, so collisions need not be
    thought of. The tokens given to later calls must continue those given to earlier ones.
    """

    def __init__(self, page_sizes: Iterable[int], salt: bytes = b"") -> None:
        self.salt = salt
        self._root = blake2b(salt, digest_size=_DIGEST_SIZE).digest()
        self._chains: dict[int, list[bytes]] = {size: [] for size in page_sizes}

    def chain(self, page_size: int, tokens: Sequence[int], pages: int) -> Sequence[bytes]:
        """Return the hashes of at least the first `pages` whole pages of tokens (a live list)."""
        chain = self._chains[page_size]
        for page in range(len(chain), pages):
            parent = chain[-1] if chain else self._root
            content = array("i", tokens[page * page_size : (page + 1) * page_size]).tobytes()
            chain.append(blake2b(parent + content, digest_size=_DIGEST_SIZE).digest())
        return chain

    def known(self, page_size: int) -> Sequence[bytes]:
        """Return the hashes computed so far (a live list)."""
        return self._chains[page_size]

    def fork(self, tokens: int) -> PrefixHashes:
        """Return a copy for a sequence that shares the first `tokens` tokens, and may differ from there on."""
        child = PrefixHashes((), self.salt)
        child._chains = {size: chain[: tokens // size] for size, chain in self._chains.items()}
        return child
