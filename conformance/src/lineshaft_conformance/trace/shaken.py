"""A checkpoint whose every weight is off by a random rounding, to see what roundings do to a generation.

Monte Carlo arithmetic (Parker 1997) does so at every operation; weights are where the contract lets a harness in, and
a product of shaken weights is off by as much, relative to its size, as one whose result was rounded once.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from lineshaft.weights.decoded import CheckpointView
from lineshaft_contract.ops.spec import epsilon
from lineshaft_contract.schemes import PLAIN, dequantize
from lineshaft_contract.weights import Stored


@dataclass(frozen=True)
class Shaken(CheckpointView):
    """`inner` with every value times 1 + u eps(dtype), u uniform in [-1/2, 1/2] and fixed by `seed`."""

    dtype: str
    seed: int

    def rows(self, name: str, start: int, stop: int) -> Stored:
        return self._shaken(name, start, self.inner.rows(name, start, stop))

    def cols(self, name: str, start: int, stop: int) -> Stored:
        return self._shaken(name, start, self.inner.cols(name, start, stop))

    def _shaken(self, name: str, start: int, stored: Stored) -> Stored:
        random = np.random.default_rng([self.seed, start, zlib.crc32(name.encode())])
        values = dequantize(stored, "float64" if self.dtype == "float64" else "float32")
        noise = random.random(values.shape, values.dtype) - values.dtype.type(0.5)
        data = values + values * noise * values.dtype.type(epsilon(self.dtype))
        return Stored(PLAIN, data.shape, {"data": data})
