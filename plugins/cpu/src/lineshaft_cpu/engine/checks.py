"""What a step's inputs must keep to, checked before C reads them: an index out of range is an error, not a crash."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lineshaft_contract.errors import ContractViolation
from lineshaft_contract.ops.spec import HostArray
from lineshaft_contract.steps import HostStep, StepShape


def check_step(host: HostStep, shape: StepShape, pages: Mapping[int, int]) -> None:
    """Raises ContractViolation for page ids, lengths, rows and slots out of range; `pages` counts those of each group."""
    views = host.views
    if (starts := views.get("query_starts")) is not None:
        if starts[0] < 0 or starts[-1] > shape.tokens or (len(starts) > 2 and np.any(np.diff(starts) < 0)):
            raise ContractViolation(
                f"query_starts {starts.tolist()[:8]}...: they ascend from 0 to at most {shape.tokens}, the tokens of the step"
            )
    if (rows := views.get("logit_rows")) is not None:
        within("logit_rows", rows, max(1, shape.tokens))
    for group, count in pages.items():
        table = views.get(f"page_table.{group}")
        if table is None or table.dtype != np.int32:
            continue
        within(f"page_table.{group}", table, count)


def within(name: str, values: HostArray, limit: int) -> None:
    """Raises ContractViolation unless all of int32 `values` are from 0 to below `limit`."""
    if values.size and int(values.view(np.uint32).max()) >= limit:
        raise ContractViolation(
            f"{name} holds {int(values.min())} to {int(values.max())}; allowed are 0 to {limit - 1}"
        )
