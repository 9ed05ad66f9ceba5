"""Every block format decodes to what the gguf package says, however it is cut on block borders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as decoded

from lineshaft.errors import LayoutError
from lineshaft.weights.checkpoint import open_checkpoint
from lineshaft_contract.schemes import BLOCKS, GGUF_TYPES, dequantize

ROWS, BLOCKS_A_ROW = 48, 3
NAME = "model.layers.0.mlp.gate_proj.weight"


def blocks(scheme: str) -> np.ndarray[Any, Any]:
    """Random bytes: every value of every field, so scales that are NaN too."""
    rng = np.random.default_rng(sorted(BLOCKS).index(scheme))
    return rng.integers(0, 256, (ROWS, BLOCKS_A_ROW * BLOCKS[scheme].nbytes), np.uint8)


@pytest.mark.parametrize("scheme", sorted(BLOCKS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_scheme(scheme: str, write_gguf: Callable[..., Path], plain_tensors: dict[str, Any]) -> None:
    kind, data, size = gguf.GGMLQuantizationType[scheme.upper()], blocks(scheme), BLOCKS[scheme].size
    checkpoint = open_checkpoint(write_gguf(plain_tensors | {"blk.0.ffn_gate.weight": (data, kind)}))
    expected = decoded(data, kind)
    assert checkpoint.shape(NAME) == expected.shape == (ROWS, BLOCKS_A_ROW * size)
    assert checkpoint.rows(NAME, 0, ROWS).scheme == scheme
    np.testing.assert_array_equal(dequantize(checkpoint.rows(NAME, 0, ROWS), "float32"), expected)
    np.testing.assert_array_equal(dequantize(checkpoint.rows(NAME, 5, 23), "float32"), expected[5:23])
    middle = dequantize(checkpoint.cols(NAME, size, 2 * size), "float32")
    np.testing.assert_array_equal(middle, expected[:, size : 2 * size])
    with pytest.raises(LayoutError, match=f"blocks of {size} columns"):
        checkpoint.cols(NAME, 0, size + size // 2)
    half = dequantize(checkpoint.rows(NAME, 0, ROWS), "bfloat16").astype(np.float32)
    finite = np.isfinite(expected) & np.isfinite(half)
    np.testing.assert_allclose(half[finite], expected[finite], rtol=2**-8)


def test_types_have_the_numbers_of_the_format() -> None:
    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {*map(str.upper, BLOCKS)} <= {*GGUF_TYPES}
    for number, name in enumerate(GGUF_TYPES):
        assert name == known.get(number, str(number))
