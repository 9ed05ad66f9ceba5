"""What a step is given: its static shape, the ordered list of its inputs, and the packed host buffer of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from lineshaft_contract.problems import itemsize

ALIGNMENT = 16
"""Every input starts at a multiple of this many bytes in the packed host buffer."""


@dataclass(frozen=True)
class StepShape:
    """A bucket: the static shape of a step. One program each; equal on all dp replicas.

    `tokens` T, `rows` B, `pages` P of each cache group, `logits` R, `max_query` the longest query of a row.
    """

    tokens: int
    rows: int
    pages: tuple[int, ...]
    logits: int
    max_query: int
    steps: int = 1


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array that is not there yet."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class InputField:
    """One named input of a program."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class InputLayout:
    """The ordered inputs of a program and their offsets in the packed host buffer."""

    def __init__(self, fields: Sequence[InputField]) -> None:
        self.fields = tuple(fields)
        self.offsets: dict[str, int] = {}
        self._places: list[tuple[str, tuple[int, ...], np.dtype[Any], int]] = []
        end = 0
        for item in self.fields:
            self.offsets[item.name] = end
            dtype = np.dtype(item.dtype)
            self._places.append((item.name, item.shape, dtype, end))
            end += -(-math.prod(item.shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.nbytes = max(end, ALIGNMENT)

    def to_json(self) -> list[list[Any]]:
        """The fields as plain lists."""
        return [[item.name, item.dtype, list(item.shape)] for item in self.fields]

    @classmethod
    def from_json(cls, data: Sequence[Sequence[Any]]) -> InputLayout:
        """The inverse of `to_json`."""
        return cls([InputField(name, dtype, tuple(shape)) for name, dtype, shape in data])

    def views(self, buffer: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, np.ndarray[Any, Any]]:
        """Named views into `buffer`, a uint8 array of at least `nbytes` bytes."""
        return {name: np.ndarray(shape, dtype, buffer, offset) for name, shape, dtype, offset in self._places}


class HostStep:
    """A packed host buffer with named views; all zeros is the legal empty step."""

    def __init__(self, layout: InputLayout, buffer: np.ndarray[Any, np.dtype[np.uint8]] | None = None) -> None:
        self.layout = layout
        self.buffer = aligned_zeros(layout.nbytes) if buffer is None else buffer
        self.views = layout.views(self.buffer)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return self.views[name]


def aligned_zeros(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A zeroed uint8 array whose first byte lies on a multiple of `ALIGNMENT`."""
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


@cache
def forward_inputs(shape: StepShape, page_starts: frozenset[int] = frozenset()) -> InputLayout:
    """The inputs of a forward program.

    token_ids int32[T], positions int32[T], query_starts int32[B+1], logit_rows int32[R], and for each cache group g:
    slots.g int32[T], page_table.g int32[B,P], context_lens.g int32[B] and, for groups in `page_starts`,
    page_starts.g int32[B,P].
    """
    fields = [
        InputField("token_ids", "int32", (shape.tokens,)),
        InputField("positions", "int32", (shape.tokens,)),
        InputField("query_starts", "int32", (shape.rows + 1,)),
        InputField("logit_rows", "int32", (shape.logits,)),
    ]
    for group, pages in enumerate(shape.pages):
        fields.append(InputField(f"slots.{group}", "int32", (shape.tokens,)))
        fields.append(InputField(f"page_table.{group}", "int32", (shape.rows, pages)))
        fields.append(InputField(f"context_lens.{group}", "int32", (shape.rows,)))
        if group in page_starts:
            fields.append(InputField(f"page_starts.{group}", "int32", (shape.rows, pages)))
    return InputLayout(fields)


@cache
def sample_inputs(rows: int, typical: bool = False) -> InputLayout:
    """The inputs of a sampling program over R rows: u f32[R,1], temperature, top_p, min_p f32[R], top_k int32[R], and
    for a `typical` one typical_p f32[R].

    All-zero is greedy: a row of temperature 0 takes the largest logit, lowest index first. top_k 0, top_p 0 and
    typical_p 0 keep every token.
    """
    names = ("temperature", "top_p", "min_p", *(("typical_p",) if typical else ()))
    floats = [InputField(name, "float32", (rows,)) for name in names]
    return InputLayout([InputField("u", "float32", (rows, 1)), *floats, InputField("top_k", "int32", (rows,))])


@cache
def mask_inputs(rows: int, vocab: int) -> InputLayout:
    """The input of a program that masks R rows of logits: mask uint32[R, ceil(V / 32)]. All-zero allows no token."""
    return InputLayout([InputField("mask", "uint32", (rows, -(-vocab // 32)))])


@cache
def edit_inputs(rows: int, edits: int) -> InputLayout:
    """The inputs of a program that edits K logits in each of R rows: edit_ids int32[R,K], edit_scale and edit_bias
    f32[R,K]. All-zero edits nothing."""
    shape = (rows, edits)
    floats = [InputField(name, "float32", shape) for name in ("edit_scale", "edit_bias")]
    return InputLayout([InputField("edit_ids", "int32", shape), *floats])


@dataclass(frozen=True)
class PageView:
    """What one cache group sees of a step, as arrays of the backend."""

    slots: Any  # int32[T] = page * page_size + offset
    page_table: Any  # int32[B, P]
    context_lens: Any  # int32[B], keys visible after this step's writes; 0 is a padding row
    page_starts: Any = None  # int32[B, P]


@dataclass(frozen=True)
class StepInputs:
    """A step's inputs as arrays of the backend, by name; `groups` holds a PageView per cache group."""

    arrays: dict[str, Any] = field(repr=False)
    shape: StepShape

    @property
    def token_ids(self) -> Any:  # int32[T]
        return self.arrays["token_ids"]

    @property
    def positions(self) -> Any:  # int32[T], for RoPE only
        return self.arrays["positions"]

    @property
    def query_starts(self) -> Any:  # int32[B+1], non-decreasing; tokens >= query_starts[B] are padding
        return self.arrays["query_starts"]

    @property
    def logit_rows(self) -> Any:  # int32[R]
        return self.arrays["logit_rows"]

    @cached_property
    def groups(self) -> tuple[PageView, ...]:
        return tuple(self._group(g) for g in range(len(self.shape.pages)))

    def _group(self, g: int) -> PageView:
        get = self.arrays.get
        return PageView(get(f"slots.{g}"), get(f"page_table.{g}"), get(f"context_lens.{g}"), get(f"page_starts.{g}"))
