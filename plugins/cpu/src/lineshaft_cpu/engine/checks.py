"""What a step's inputs must keep to, checked before C reads them: an index out of range is an error, not a crash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.steps import HostStep, StepShape

largest, smallest = np.maximum.reduce, np.minimum.reduce  # without the detour of `max` and `min` through Python


class Paging(NamedTuple):
    """Of a cache group: its pages, the null page among them, and the slots of each."""

    pages: int
    size: int


def check_step(host: HostStep, shape: StepShape, groups: Mapping[int, Paging], positions: int | None = None) -> None:
    """Raises ContractViolation for lengths, rows, positions, page ids and slots out of range.

    positions   how many positions the program's tables of angles have; None where it reads none

    Positions and slots of padding tokens are not read, and not checked.
    """
    views, live = host.views, shape.tokens
    if (starts := views.get("query_starts")) is not None:
        live = check_starts(starts, shape)
    if (rows := views.get("logit_rows")) is not None:
        within("logit_rows", rows, max(1, shape.tokens))
    if positions is not None and (found := views.get("positions")) is not None:
        within("positions", found[:live], positions)
    for group, paging in groups.items():
        check_group(views, group, paging, live)


def check_starts(starts: HostArray, shape: StepShape) -> int:
    """How many tokens are not padding, by query_starts [B + 1]. Raises ContractViolation."""
    live = int(starts[-1])
    lengths = starts[1:] - starts[:-1]
    if starts[0] < 0 or live > shape.tokens or (lengths.size and int(smallest(lengths)) < 0):
        raise ContractViolation(
            f"query_starts {starts.tolist()[:8]}...: they ascend from 0 to at most {shape.tokens}, the tokens of the "
            "step"
        )
    if lengths.size and (longest := int(largest(lengths))) > shape.max_query:
        raise ContractViolation(
            f"query_starts hold a row of {longest} tokens; the program was captured for at most "
            f"{shape.max_query} in a row"
        )
    return live


def check_group(views: Mapping[str, HostArray], group: int, paging: Paging, live: int) -> None:
    """The inputs of one cache group. Raises ContractViolation."""
    if (slots := views.get(f"slots.{group}")) is not None:
        within(f"slots.{group}", slots[:live], paging.pages * paging.size)
    if (table := views.get(f"page_table.{group}")) is None:
        return
    within(f"page_table.{group}", table, paging.pages)
    lengths = views.get(f"context_lens.{group}")
    if lengths is not None and f"page_starts.{group}" not in views:
        within(f"context_lens.{group}", lengths, table.shape[1] * paging.size + 1)


def check_pages(problem: KVProblem, count: int, pages: Mapping[str, HostArray]) -> None:
    """What is written to pages of a cache. Raises ContractViolation for other arrays, shapes or dtypes."""
    for name, (shape, dtype) in problem.page_arrays.items():
        given = pages.get(name)
        if given is None or given.shape != (count, *shape) or given.dtype.name != dtype:
            said = "nothing" if given is None else f"{given.dtype.name}{list(given.shape)}"
            raise ContractViolation(f"write_pages is given {said} as {name!r}; it takes {dtype}{[count, *shape]}")


def within(name: str, values: HostArray, limit: int) -> None:
    """Raises ContractViolation unless all of int32 `values` are from 0 to below `limit`."""
    if values.size and int(largest(values.view(np.uint32), None)) >= limit:
        raise ContractViolation(
            f"{name} holds {int(values.min())} to {int(values.max())}; allowed are 0 to {limit - 1}"
        )
