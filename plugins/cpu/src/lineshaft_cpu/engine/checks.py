"""What a step's inputs must keep to, checked before C reads them: an index out of range is an error, not a crash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ctypes import POINTER, Structure, addressof, c_int64, c_void_p
from math import prod
from typing import NamedTuple

import numpy as np

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.steps import InputLayout, StepShape
from lineshaft_cpu.native import Native

DISORDERED, TOO_LONG = -2, -3
"""What `lineshaft_broken` returns beside the index of a bound that is broken, or -1; `native/inputs.c` has the same."""


class Paging(NamedTuple):
    """Of a cache group: its pages, the null page among them, and the slots of each."""

    pages: int
    size: int


class Limit(NamedTuple):
    """The int32 input `name` is from 0 to below `limit`; `padded`: only of tokens that are no padding."""

    name: str
    limit: int
    padded: bool = False


class _Bound(Structure):
    _fields_ = [(name, c_int64) for name in ("offset", "count", "limit", "padded")]


class _Inputs(Structure):
    _fields_ = [(name, c_int64) for name in ("starts", "rows", "tokens", "longest", "count")]
    _fields_ += [("bounds", POINTER(_Bound))]


class StepCheck:
    """What the inputs of one program must keep to: lengths, rows, positions, page ids and slots in range.

    step        the packed inputs, uint8 of the layout's bytes, where every step has them
    positions   how many positions the program's tables of angles have; None where it reads none
    """

    def __init__(
        self,
        native: Native,
        step: HostArray,
        inputs: InputLayout,
        shape: StepShape,
        groups: Mapping[int, Paging],
        positions: int | None = None,
    ) -> None:
        self._views, self._shape = inputs.views(step), shape
        self._broken = native.shared("broken", c_int64, c_void_p, c_void_p)
        sizes = {field.name: prod(field.shape) for field in inputs.fields}
        widths = {field.name: field.shape[-1] for field in inputs.fields}
        self._limits = [limit for limit in limits(shape, groups, widths, positions) if limit.name in sizes]
        offsets = inputs.offsets
        bounds = [_Bound(offsets[name], sizes[name], limit, padded) for name, limit, padded in self._limits]
        fixed = shape.rows, shape.tokens, shape.max_query, len(bounds)
        self._job = _Inputs(offsets.get("query_starts", -1), *fixed, (_Bound * len(bounds))(*bounds))
        self._arguments = step.ctypes.data, addressof(self._job)

    def __call__(self) -> None:
        """Check the inputs that are there now. Raises ContractViolation."""
        if (broken := self._broken(*self._arguments)) != -1:
            raise ContractViolation(self._say(broken))

    def _say(self, broken: int) -> str:
        views, shape = self._views, self._shape
        starts = views.get("query_starts")
        if starts is not None and broken == DISORDERED:
            return (
                f"query_starts {starts.tolist()[:8]}...: they ascend from 0 to at most {shape.tokens}, the tokens of "
                "the step"
            )
        if starts is not None and broken == TOO_LONG:
            return (
                f"query_starts hold a row of {int(np.diff(starts).max())} tokens; the program was captured for at most "
                f"{shape.max_query} in a row"
            )
        name, limit, padded = self._limits[broken]
        return beyond(name, views[name][: starts[-1]] if padded and starts is not None else views[name], limit)


def limits(
    shape: StepShape, groups: Mapping[int, Paging], widths: Mapping[str, int], positions: int | None
) -> Iterator[Limit]:
    """Of every input that a program may have; `widths`: the last length of those that it has."""
    yield Limit("logit_rows", max(1, shape.tokens))
    if positions is not None:
        yield Limit("positions", positions, padded=True)
    for group, paging in groups.items():
        yield Limit(f"slots.{group}", paging.pages * paging.size, padded=True)
        yield Limit(f"page_table.{group}", paging.pages)
        width = widths.get(f"page_table.{group}")
        if width is not None and f"page_starts.{group}" not in widths:
            yield Limit(f"context_lens.{group}", width * paging.size + 1)


def check_pages(problem: KVProblem, count: int, pages: Mapping[str, HostArray]) -> None:
    """What is written to pages of a cache. Raises ContractViolation for other arrays, shapes or dtypes."""
    if unknown := pages.keys() - problem.page_arrays.keys():
        raise ContractViolation(
            f"write_pages is given {', '.join(sorted(unknown))}; the cache has {', '.join(problem.page_arrays)}"
        )
    for name, (shape, dtype) in problem.page_arrays.items():
        given = pages.get(name)
        if given is None or given.shape != (count, *shape) or given.dtype.name != dtype:
            said = "nothing" if given is None else f"{given.dtype.name}{list(given.shape)}"
            raise ContractViolation(f"write_pages is given {said} as {name!r}; it takes {dtype}{[count, *shape]}")


def within(name: str, values: HostArray, limit: int) -> None:
    """Raises ContractViolation unless all of int64 `values` are from 0 to below `limit`."""
    if values.size and int(values.view(np.uint64).max()) >= limit:
        raise ContractViolation(beyond(name, values, limit))


def beyond(name: str, values: HostArray, limit: int) -> str:
    """What is wrong with values some of which are not from 0 to below `limit`."""
    return f"{name} holds {int(values.min())} to {int(values.max())}; allowed are 0 to {limit - 1}"
