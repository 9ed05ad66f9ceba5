"""What a model declares about its parameters, and what a backend makes of them.

A `Param` drives loading, sharding and the memory estimate; a `Weight` is the backend's prepared form, opaque to
models. This file knows no checkpoint format and no array library but NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lineshaft_contract.problems import Problem

Array = Any
"""An array of whatever library the backend uses. The core reads `.shape` and calls `.reshape` and static slices."""


@dataclass(frozen=True)
class Stored:
    """One tensor as the checkpoint stores it, in checkpoint order `[out, in]`.

    `scheme` is "none" for plain numbers (`arrays["data"]` has the shape `shape` and its own dtype, bf16 and fp8 as
    ml_dtypes) or the name of a block-quantization scheme such as "q4_1" (`arrays["data"]` is uint8
    `[out, bytes per row]`). `shape` is always the logical shape.
    """

    scheme: str
    shape: tuple[int, ...]
    arrays: Mapping[str, np.ndarray[Any, Any]]


class Checkpoint(Protocol):
    """Where parameters come from: named tensors under their Hugging Face names, whatever the file format.

    Formats that store a tensor in another row order (GGUF's permuted Llama q/k rows) put it back here, so that a
    model never knows which format it was loaded from.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...  # in the words of a Hugging Face config.json

    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...  # raises MissingTensor

    def stored_bytes(self, name: str) -> int: ...

    def rows(self, name: str, start: int, stop: int) -> Stored: ...  # cut along dim 0 ("out"); raises MissingTensor

    def cols(self, name: str, start: int, stop: int) -> Stored: ...  # cut along dim 1 ("in"), on block borders


@dataclass(frozen=True)
class Coordinate:
    """A rank's place on every axis of the mesh."""

    dp: int = 0
    pp: int = 0
    cp: int = 0
    ep: int = 0
    tp: int = 0


def coordinate_at(axes: Sequence[tuple[str, int]], rank: int) -> Coordinate:
    """The place of a rank on every axis: ranks are numbered row-major over (axis, degree), the last axis innermost."""
    place = {}
    for axis, degree in reversed(axes):
        rank, place[axis] = divmod(rank, degree)
    return Coordinate(**place)


@dataclass(frozen=True)
class Local:
    """One coordinate's share of a parameter: parts to be joined along dim 0, each as stored.

    Of a parameter of more than two dims the parts may be matrices, whose join has its rows one after another: a stack
    of experts is the list of their matrices.
    """

    parts: tuple[Stored, ...]


@dataclass(frozen=True)
class Param:
    """One parameter of a model.

    `problems` gives, for each kind of use ("linear", "embed", "norm", "experts", "const"), the problem that the
    prepared weight will be used under; all of them share one packing. Parameters with equal `source_id` hold the
    same values: tied ones that may differ in packing are several parameters of one source.
    """

    name: str
    source_id: str
    shape: tuple[int, ...]  # local, logical
    dtype: str  # executed dtype
    problems: Mapping[str, Problem]
    shard: Callable[[Checkpoint, Coordinate], Local]
    varies: tuple[str, ...] = ()

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self.problems)

    @property
    def scheme(self) -> str:
        """How products with it quantize it: the scheme of its "linear" problem, "none" where it has none."""
        return str(getattr(self.problems.get("linear"), "scheme", "none"))


@dataclass(frozen=True)
class Weight:
    """A parameter prepared by a backend: `arrays` is private to the kernels of one packing, `layout` names it.

    `key` numbers the distinct names among the tree's leaves, in their order and from 0; bound ops are found by it.
    """

    key: int
    name: str
    problems: Mapping[str, Problem]
    layout: str
    arrays: dict[str, Array] = field(default_factory=dict)
