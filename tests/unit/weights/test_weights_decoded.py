"""A plugin's block scheme comes out of any checkpoint as plain numbers; all other tensors pass untouched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lineshaft.weights.decoded import decode_with
from lineshaft_contract.weights import Stored


class Halves:
    """Stores each number as a byte, in halves."""

    name = "halves"

    def decode(self, stored: Stored) -> np.ndarray[Any, Any]:
        return stored.arrays["data"].astype(np.float32) / 2


class Checkpoint:
    """One tensor in halves and one plain, both [3, 4]."""

    config: Mapping[str, Any] = {"model_type": "x"}

    def __init__(self) -> None:
        self.bytes = np.arange(12, dtype=np.uint8).reshape(3, 4)

    def names(self) -> frozenset[str]:
        return frozenset({"halves", "plain"})

    def shape(self, name: str) -> tuple[int, ...]:
        return (3, 4)

    def stored_bytes(self, name: str) -> int:
        return 12

    def rows(self, name: str, start: int, stop: int) -> Stored:
        scheme = "halves" if name == "halves" else "none"
        return Stored(scheme, (stop - start, 4), {"data": self.bytes[start:stop]})

    def cols(self, name: str, start: int, stop: int) -> Stored:
        assert name == "plain", "blocks of a foreign scheme cannot be cut"
        return Stored("none", (3, stop - start), {"data": self.bytes[:, start:stop]})


def test_rows_and_columns_of_a_plugin_scheme_are_decoded() -> None:
    inner = Checkpoint()
    checkpoint = decode_with(inner, [Halves()])
    rows, cols = checkpoint.rows("halves", 1, 3), checkpoint.cols("halves", 1, 3)
    assert rows.scheme == cols.scheme == "none"
    assert np.array_equal(rows.arrays["data"], inner.bytes[1:3] / 2)
    assert np.array_equal(cols.arrays["data"], inner.bytes[:, 1:3] / 2) and cols.shape == (3, 2)


def test_other_tensors_and_checkpoints_pass_untouched() -> None:
    inner = Checkpoint()
    checkpoint = decode_with(inner, [Halves()])
    assert checkpoint.rows("plain", 0, 3).arrays["data"] is not None
    assert np.array_equal(checkpoint.cols("plain", 0, 2).arrays["data"], inner.bytes[:, :2])
    assert checkpoint.config is inner.config and checkpoint.names() == inner.names()
    assert decode_with(inner, []) is inner
