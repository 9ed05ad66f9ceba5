"""Packing what rows want of sampling into host buffers: draws and filters, edits and masks. Knows no batch and no
device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from lineshaft.sampling.choice import Choice, Edits
from lineshaft.sampling.draw import PURPOSE_SAMPLE, draws
from lineshaft.sampling.params import SamplingParams
from lineshaft_contract.steps import HostStep, edit_inputs, mask_inputs, sample_inputs

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


def pack_adjust(choices: Sequence[Choice | None], rows: int, vocab: int) -> tuple[HostStep, ...]:
    """The programs' inputs that edit and then mask the logits, to be run one over the result of the other; often none.

    A row with more edits than the widest program has room for takes it several times, each time for other tokens.
    """
    live = [(r, choice) for r, choice in enumerate(choices) if choice is not None]
    edits = [(r, found) for r, choice in live if len((found := choice.edits())[0])]
    masked = [(r, choice) for r, choice in live if choice.grammar is not None or choice.allowed is not None]
    return (*_pack_edits(edits, rows, vocab), *([_pack_masks(masked, rows, vocab)] if masked else []))


def _pack_edits(edits: Sequence[tuple[int, Edits]], rows: int, vocab: int) -> Iterator[HostStep]:
    most = max((len(ids) for _, (ids, _, _) in edits), default=0)
    for start in range(0, most, EDITS[-1]):
        width = next((size for size in EDITS if size >= most - start), EDITS[-1])
        host = HostStep(edit_inputs(rows, width))
        for r, arrays in edits:
            host["edit_ids"][r] = vocab  # padding
            for name, array in zip(("edit_ids", "edit_scale", "edit_bias"), arrays, strict=True):
                part = array[start : start + width]
                host[name][r, : len(part)] = part
        yield host


def _pack_masks(masked: Sequence[tuple[int, Choice]], rows: int, vocab: int) -> HostStep:
    host = HostStep(mask_inputs(rows, vocab))
    mask = host["mask"]
    mask[:] = 0xFFFFFFFF
    for r, choice in masked:
        if choice.allowed is not None:
            mask[r] = choice.allowed
    grammars = [(choice.grammar, r) for r, choice in masked if choice.grammar is not None]
    if grammars:
        grammars[0][0].vocabulary.fill(grammars, mask)
    return host
