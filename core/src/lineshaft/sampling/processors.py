"""Logits processors: functions of the user's that change one row of logits on the host, and the choice among what they
leave."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lineshaft.sampling.logprobs import Logprobs
from lineshaft.sampling.pack import pack_sampling
from lineshaft.sampling.params import SamplingParams
from lineshaft_contract.ops.logits import logprobs, sample
from lineshaft_contract.problems import SampleProblem
from lineshaft_contract.sessions import HostArray
from lineshaft_contract.steps import HostStep, sample_inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessedRow:
    """A row of logits whose request has processors; `position` as in `pack_sampling`."""

    row: int
    params: SamplingParams
    fork: int
    position: int
    prompt: Sequence[int]
    output: Sequence[int]


def choose_processed(
    rows: Sequence[ProcessedRow], logits: HostArray, token_ids: HostArray, found: Logprobs | None
) -> tuple[HostArray, Logprobs | None]:
    """What a step sampled (token_ids int32 [R]) and found, with these rows chosen anew on the host.

    logits: float32 [R, V], edited and masked. Each row goes through its request's processors and is then sampled as the
    op `sample` would, with the same random number. A row without a token gets -1.
    """
    ids = token_ids.copy()
    kept = None if found is None else Logprobs(found.chosen.copy(), found.top_ids.copy(), found.top.copy())
    for each in rows:
        r, own = each.row, _process(each, logits[each.row])[None]
        problem = SampleProblem(dtype="float32", rows=1, vocab=logits.shape[1])
        packed = pack_sampling([each.params], [each.fork], [each.position], 1) or HostStep(sample_inputs(1))
        ids[r : r + 1] = sample(problem, own, packed.views, packed["u"])
        if kept is not None:
            chosen, top_ids, top = logprobs(problem, own, ids[r : r + 1], kept.top_ids.shape[1])
            kept.chosen[r], kept.top_ids[r], kept.top[r] = chosen[0], top_ids[0], top[0]
    return ids, kept


def _process(each: ProcessedRow, logits: HostArray) -> HostArray:
    """NaN, and a line in the log, where a processor raises or returns another shape or +inf: its request ends alone."""
    given = logits.copy()
    try:
        for processor in each.params.logits_processors:
            given = np.asarray(processor(each.output, each.prompt, given), np.float32)
            if given.shape != logits.shape or np.isposinf(given).any():
                raise ValueError(f"it returned {list(given.shape)}; give float32 {list(logits.shape)} without +inf")
    except Exception:
        log.exception("a logits processor failed; its request ends with the reason 'error'")
        return np.full_like(logits, np.nan)
    return given
