"""Sets of defaults for a kind of load, taken by the name in `profile`; every key that is given itself wins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "interactive": {
        "scheduler.max_rows": 16,
        "scheduler.token_budget": 512,
        "scheduler.max_prefill_tokens": 256,
        "scheduler.admission": "priority",
        "scheduler.fair_tenants": True,
        "scheduler.straggler": 4.0,
        "cache.prefix_caching": True,
        "cache.memory_fraction": 0.5,
        "cache.watermark": 0.05,
    },
    "batch": {
        "scheduler.max_rows": 256,
        "scheduler.token_budget": 2048,
        "scheduler.admission": "fifo",
        "scheduler.cache_aware": True,
        "cache.prefix_caching": True,
        "cache.memory_fraction": 0.9,
        "cache.watermark": 0.01,
    },
}
"""For each profile the dotted keys that it sets."""
