"""Packing what rows want of sampling into host buffers: draws and filters, edits and masks. Knows no batch and no
device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from lineshaft.contract.steps import HostStep, sample_inputs
from lineshaft.sampling.draw import PURPOSE_SAMPLE, draws
from lineshaft.sampling.params import SamplingParams

EDITS = (64, 1024)
"""Edits a row of the programs that edit logits: 12 bytes each. A row with more takes the largest one repeatedly."""


def pack_sampling(
    params: Sequence[SamplingParams], forks: Sequence[int], positions: Sequence[int], rows: int
) -> HostStep | None:
    """The sampling program's inputs, or None when every row is greedy (an argmax serves).

    forks: which of its prompt's samples a row is; positions: index, in prompt and output together, of the token to
    come. The uniform number of a row depends on its seed and on these two, and on nothing else.
    """
    hot = [(r, one) for r, one in enumerate(params) if one.temperature > 0]
    if not hot:
        return None
    at = np.array([r for r, _ in hot])
    flat = chain.from_iterable([one.filters for _, one in hot])
    filters = np.fromiter(flat, np.float64, 5 * len(hot)).reshape(-1, 5)
    typical = bool(filters[:, 3].min() < 1)
    host = HostStep(sample_inputs(rows, typical))
    for column, name in enumerate(("temperature", "top_p", "min_p", *(("typical_p",) if typical else ()))):
        host[name][at] = filters[:, column]
    host["top_k"][at] = filters[:, 4]
    seeds = [one.seed or 0 for _, one in hot]
    host["u"][at, 0] = draws(seeds, [forks[r] for r, _ in hot], [positions[r] for r, _ in hot], PURPOSE_SAMPLE, 0)
    return host
