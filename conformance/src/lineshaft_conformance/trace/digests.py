"""Describes an array in a few numbers, from which the distance to another array can be told within a tolerance.

Knows arrays only: no op, no step, no file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lineshaft_contract.sessions import HostArray

BUCKETS = 64
BLOCK = 1 << 18
SPREAD = 1 + 3 * math.sqrt(1 / (2 * BUCKETS))
"""How far above the truth an estimated distance may lie: three standard deviations. The squared distance has a relative
standard deviation of at most sqrt(2 / BUCKETS), the distance itself half of that."""


@dataclass(frozen=True)
class Digest:
    """What is kept of an array.

    sha256   of its bytes in C order
    l2, top  its L2 norm and largest magnitude, both over finite values
    nan, inf how many values are so
    sketch   float64 [BUCKETS], see `sketch`
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    l2: float
    top: float
    nan: int
    inf: int
    sketch: HostArray

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rms(self) -> float:
        return self.l2 / math.sqrt(max(self.size, 1))


def digest(array: HostArray) -> Digest:
    """The digest of a host array of any dtype."""
    array = np.ascontiguousarray(array)
    square, top, nan, inf = 0.0, 0.0, 0, 0
    for values in blocks(array):
        nan, inf = nan + int(np.isnan(values).sum()), inf + int(np.isinf(values).sum())
        finite = finite_part(values)
        square += float(finite @ finite)
        top = max(top, float(np.abs(finite).max(initial=0.0)))
    sha = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
    return Digest(array.dtype.name, array.shape, sha, math.sqrt(square), top, nan, inf, sketch(array))


def sketch(array: HostArray) -> HostArray:
    """A count sketch, float64 [BUCKETS]: every value gets a random sign and is added to a random bucket.

    The map is linear and preserves squared distances in expectation (a sparse Johnson-Lindenstrauss transform), so the
    L2 norm of the difference of two sketches estimates the L2 distance of the arrays: the square is unbiased and has a
    relative standard deviation of at most sqrt(2 / BUCKETS). Signs and buckets come from Philox seeded by the number of
    values, and are the same on every machine. Values that are not finite count as 0. (Charikar, Chen, Farach-Colton
    2002; Weinberger et al. 2009.)
    """
    random = np.random.Generator(np.random.Philox(array.size))
    out = np.zeros(BUCKETS)
    for values in blocks(array):
        drawn = np.frombuffer(random.bytes(values.size), np.uint8)
        signs = (drawn >> 7).astype(np.float64) * 2 - 1
        out += np.bincount(drawn & (BUCKETS - 1), weights=signs * finite_part(values), minlength=BUCKETS)
    return out


def blocks(array: HostArray) -> Iterator[HostArray]:
    """The values in C order as float64, so many at a time that no large copy is made."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK].astype(np.float64)


def finite_part(values: HostArray) -> HostArray:
    """The values with 0 for those that are not finite."""
    return np.where(np.isfinite(values), values, 0.0)


@dataclass(frozen=True)
class Distance:
    """How far two arrays are apart: RMS, and the largest difference where it is known (else NaN)."""

    rms: float
    largest: float = math.nan


def estimate(a: Digest, b: Digest) -> Distance:
    """The distance of two arrays of one shape by their digests; 0 where their bytes are equal."""
    if a.sha256 == b.sha256 and a.dtype == b.dtype:
        return Distance(0.0, 0.0)
    return Distance(float(np.linalg.norm(a.sketch - b.sketch)) / math.sqrt(max(a.size, 1)))


def exact(a: HostArray, b: HostArray) -> Distance:
    """The distance of two arrays of one shape; values that are not finite count as 0."""
    square, largest = 0.0, 0.0
    for x, y in zip(blocks(a), blocks(b), strict=True):
        apart = finite_part(x) - finite_part(y)
        square += float(apart @ apart)
        largest = max(largest, float(np.abs(apart).max(initial=0.0)))
    return Distance(math.sqrt(square / max(a.size, 1)), largest)
