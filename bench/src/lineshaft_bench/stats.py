"""Percentiles and spreads of measured values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Percentiles:
    """Of one quantity, in its unit; all 0 where there is no value."""

    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    mean: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Of these values, with linear interpolation between them."""
        if not len(values):
            return cls()
        array = np.asarray(values, np.float64)
        p50, p90, p95, p99 = map(float, np.percentile(array, PERCENTILES))
        return cls(p50, p90, p95, p99, float(array.mean()), float(array.max()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))
