"""Sampling on the host: greedy rows cost one scan, and the others sort only as many tokens as their filters keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lineshaft_contract.ops.logits import typical_order
from lineshaft_contract.problems import SampleProblem
from lineshaft_cpu.priority import TORCH
from lineshaft_torch.arrays import host_view
from lineshaft_torch.bound import Recipe, recipe, stateless, with_problem

HostArray = np.ndarray[Any, Any]
FIRST_SORT = 256
"""Tokens ranked first where top_p or min_p may keep any number of them; eight times as many whenever that is short."""


def host_logits(logits: torch.Tensor) -> HostArray:
    """logits [R, V] as float32 or float64 on the host; NumPy scans a row many times faster than torch."""
    return host_view(logits.contiguous() if logits.itemsize >= 4 else logits.float())


def argmax(logits: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """logits [R, V] -> int32[R]; the lowest index wins a tie; -1 for a row with a NaN or nothing above -inf."""
    best = torch.from_numpy(_argmax(host_logits(logits)))
    return best.int() if out is None else out.copy_(best)


def _argmax(values: HostArray) -> HostArray:
    best = values.argmax(-1)  # a NaN counts as the largest
    return np.where(values[np.arange(len(values)), best] > -np.inf, best, -1)


def sample(
    problem: SampleProblem,
    logits: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    u: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits [R, V], u f32[R, 1] -> int32[R]; temperature 0 is argmax, -1 stands for a row with NaN or nothing kept."""
    values, best = host_logits(logits), argmax(logits, out=out)
    keys = ("temperature", "top_k", "top_p", "min_p", *(("typical_p",) if problem.typical else ()))
    settings = zip(u[:, 0].tolist(), *(params[key].tolist() for key in keys), strict=True)
    for r, (point, temperature, *filters) in enumerate(settings):
        if temperature > 0 and best[r] >= 0:
            best[r] = _draw(values[r].astype(np.float64) / temperature, point, *filters)
    return best


def _draw(x: HostArray, point: float, top_k: int, top_p: float, min_p: float, typical_p: float = 0.0) -> int:
    """One token of scaled logits x [V]: filter, then inverse CDF over the kept tokens in id order."""
    weights = np.exp(x - x.max())
    kept = _kept(x, weights, top_k, top_p, min_p)
    if 0 < typical_p < 1:
        kept = _typical(np.flatnonzero(weights) if kept is None else kept, weights, typical_p)
    gathered = np.cumsum(weights if kept is None else weights[kept])
    at = int(np.searchsorted(gathered, point * gathered[-1], side="right"))
    if kept is not None:
        return int(kept[min(at, len(kept) - 1)])
    return at if at < len(x) else int(np.flatnonzero(weights)[-1])


def _kept(x: HostArray, weights: HostArray, top_k: int, top_p: float, min_p: float) -> HostArray | None:
    """Ids that the filters keep, in id order; None: all."""
    limit = top_k if 0 < top_k < len(x) else len(x)
    nucleus = 0 < top_p < 1
    if limit == len(x) and not nucleus:
        return np.flatnonzero(weights >= min_p) if min_p > 0 else None
    count = limit if limit < len(x) else min(FIRST_SORT, limit)
    total = weights.sum() if limit == len(x) else None
    while True:
        ids = _largest(x, count)
        ranked = weights[ids]
        mass = ranked.sum() if total is None else total
        before = np.cumsum(ranked) - ranked
        if count == limit or before[-1] >= top_p * mass:
            break
        count = min(count * 8, limit)
    keep = ranked >= min_p if min_p > 0 else ranked > 0
    if nucleus:
        keep &= before < top_p * mass
    return np.sort(ids[keep])


def _typical(kept: HostArray, weights: HostArray, typical_p: float) -> HostArray:
    """Those of the kept ids whose surprise lies nearest to the entropy, in id order."""
    near, before = typical_order(kept, weights[kept])
    return np.sort(kept[near[before < typical_p]])


def _largest(x: HostArray, count: int) -> HostArray:
    """Ids of the `count` largest values in descending order, ties to the lowest id."""
    if count < len(x):
        border = np.partition(x, len(x) - count)[len(x) - count]
        above, level = np.flatnonzero(x > border), np.flatnonzero(x == border)
        candidates = np.sort(np.concatenate([above, level[: count - len(above)]]))
    else:
        candidates = np.arange(len(x))
    return candidates[np.argsort(-x[candidates], kind="stable")]


def recipes() -> Iterator[Recipe]:
    yield recipe("cpu_argmax", "argmax", stateless(argmax), out=True, priority=TORCH)
    yield recipe("cpu_sample", "sample", with_problem(sample), out=True, priority=TORCH, handles=frozenset({"typical"}))
