"""A checkpoint whose tensors are lazy views of memory-mapped files: what every file format is turned into.

Owns the cutting of rows and columns. Knows no file format.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np

from lineshaft.errors import CorruptCheckpoint, MisshapenTensor, MissingTensor, ModelNotFound
from lineshaft_contract.schemes import cut_columns
from lineshaft_contract.weights import Stored

DTYPES: Final[Mapping[str, str]] = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BOOL": "bool",
}
"""How files call the dtypes of plain numbers: safetensors all of these, GGUF some."""


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped read-only. Raises ModelNotFound, or CorruptCheckpoint if it is empty."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path} is empty; download it again") from error
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error


@dataclass(frozen=True)
class TensorView:
    """One tensor of a file.

    `data` has the logical `shape` and the stored dtype (scheme "none"), or is uint8 with the bytes of a row as its
    last dim. `order`, if given, is int64 `[shape[0]]`: the stored row of each logical row.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]
    order: np.ndarray[Any, Any] | None = None

    def rows(self, start: int, stop: int) -> Stored:
        """Rows `start:stop`: a view, or a copy of just these rows if the file holds them in another order."""
        self._check_range(0, start, stop)
        cut = self.data[start:stop] if self.order is None else self.data[self.order[start:stop]]
        return Stored(self.scheme, (stop - start, *self.shape[1:]), {"data": cut})

    def cols(self, start: int, stop: int) -> Stored:
        """Columns `start:stop` of a 2-D tensor, on block borders."""
        if len(self.shape) != 2:
            raise MisshapenTensor(f"tensor {self.name} has shape {self.shape}; only 2 dims can be cut in columns")
        self._check_range(1, start, stop)
        cut = self.data[:, cut_columns(self.scheme, start, stop, self.name)]
        data = cut if self.order is None else cut[self.order]
        return Stored(self.scheme, (self.shape[0], stop - start), {"data": data})

    def _check_range(self, dim: int, start: int, stop: int) -> None:
        if not self.shape or not 0 <= start <= stop <= self.shape[dim]:
            raise MisshapenTensor(
                f"tensor {self.name} has shape {self.shape} and cannot be cut at {start}:{stop} of dim {dim}; "
                "the model's configuration and the checkpoint disagree"
            )


@dataclass(frozen=True)
class MappedCheckpoint:
    """A checkpoint in mapped files; a `contract.weights.Checkpoint`. `config` is in the words of a Hugging Face
    config.json."""

    path: Path
    config: Mapping[str, Any]
    views: Mapping[str, TensorView]

    def names(self) -> frozenset[str]:
        """The Hugging Face names of all tensors."""
        return frozenset(self.views)

    def shape(self, name: str) -> tuple[int, ...]:
        """The logical shape, `[out, in]` for a matrix. Raises MissingTensor."""
        return self._view(name).shape

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor in the file. Raises MissingTensor."""
        return self._view(name).data.nbytes

    def rows(self, name: str, start: int, stop: int) -> Stored:
        """Rows `start:stop` of dim 0. Raises MissingTensor, or MisshapenTensor if there are not as many."""
        return self._view(name).rows(start, stop)

    def cols(self, name: str, start: int, stop: int) -> Stored:
        """Columns `start:stop` of dim 1. Raises MissingTensor, MisshapenTensor, or LayoutError inside a block."""
        return self._view(name).cols(start, stop)

    def _view(self, name: str) -> TensorView:
        try:
            return self.views[name]
        except KeyError:
            near = get_close_matches(name, self.views, n=3)
            hint = f"; the nearest names are {', '.join(near)}" if near else ""
            raise MissingTensor(
                f"{self.path} has no tensor {name}{hint}; use a checkpoint of the architecture that its config names"
            ) from None
