"""The paged cache manager: which pages of each cache group hold which tokens of which sequence.

Knows page ids only: no arrays, no devices, no requests.
"""

from __future__ import annotations

from lineshaft.cache.eviction import EVICTION
from lineshaft.cache.manager import CacheManager, PrefixStats
from lineshaft.cache.pool import GroupSpec, PageCopy, PageSwap, pages_for, pages_in_window
from lineshaft.cache.prefix import PrefixHashes

__all__ = [
    "EVICTION",
    "CacheManager",
    "GroupSpec",
    "PageCopy",
    "PageSwap",
    "PrefixHashes",
    "PrefixStats",
    "pages_for",
    "pages_in_window",
]
