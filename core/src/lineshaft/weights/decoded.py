"""A checkpoint whose block schemes a plugin knows: what it alone can decode comes out as plain numbers.

Column cuts are the checkpoint's own business, so a scheme that core does not know is cut after decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lineshaft_contract.schemes import PLAIN
from lineshaft_contract.weights import Checkpoint, Stored


class Scheme(Protocol):
    """A block-quantization scheme of a plugin; `decode` gives the numbers, of `stored.shape`, as a float array."""

    @property
    def name(self) -> str: ...

    def decode(self, stored: Stored) -> np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class CheckpointView:
    """`inner` but for the values of its tensors: a subclass gives `rows` and `cols`."""

    inner: Checkpoint

    @property
    def config(self) -> Mapping[str, Any]:
        return self.inner.config

    def names(self) -> frozenset[str]:
        return self.inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def stored_bytes(self, name: str) -> int:
        return self.inner.stored_bytes(name)


@dataclass(frozen=True)
class DecodedCheckpoint(CheckpointView):
    """`inner`, with tensors of the given schemes decoded as they are read."""

    schemes: Mapping[str, Scheme]

    def rows(self, name: str, start: int, stop: int) -> Stored:
        return self._decoded(self.inner.rows(name, start, stop))

    def cols(self, name: str, start: int, stop: int) -> Stored:
        if self.inner.rows(name, 0, 1).scheme not in self.schemes:
            return self.inner.cols(name, start, stop)
        data = self.rows(name, 0, self.shape(name)[0]).arrays["data"][:, start:stop]
        return Stored(PLAIN, data.shape, {"data": data})

    def _decoded(self, stored: Stored) -> Stored:
        scheme = self.schemes.get(stored.scheme)
        return stored if scheme is None else Stored(PLAIN, stored.shape, {"data": scheme.decode(stored)})


def decode_with(checkpoint: Checkpoint, schemes: Sequence[Scheme]) -> Checkpoint:
    """`checkpoint` itself where no plugin brings a scheme."""
    return DecodedCheckpoint(checkpoint, {scheme.name: scheme for scheme in schemes}) if schemes else checkpoint
