"""Filters keep what transformers' warpers keep, and tokens come as often as the filtered probabilities say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import generation

from lineshaft.sampling import SamplingParams
from lineshaft.sampling.pack import pack_sampling
from lineshaft_contract.ops.logits import kept_tokens
from lineshaft_contract.problems import SampleProblem
from lineshaft_torch.kernels.logits import sample

WARPERS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "top_k": ({"top_k": 9}, [generation.TopKLogitsWarper(9)]),
    "top_p": ({"top_p": 0.8}, [generation.TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.05}, [generation.MinPLogitsWarper(0.05)]),
    "typical_p": ({"typical_p": 0.6}, [generation.TypicalLogitsWarper(0.6)]),
    "all": (
        {"temperature": 1.4, "top_k": 60, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.7},
        [
            generation.TemperatureLogitsWarper(1.4), generation.TopKLogitsWarper(60), generation.TopPLogitsWarper(0.9),
            generation.MinPLogitsWarper(0.01), generation.TypicalLogitsWarper(0.7),
        ],
    ),
}  # fmt: skip


def warped(name: str, logits: Any) -> Any:
    x = torch.from_numpy(logits)
    for warper in WARPERS[name][1]:
        x = warper(None, x)
    return x.numpy()


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("seed", range(20))
def test_the_kept_tokens_are_those_of_transformers(name: str, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((1, 300)) * (1 + seed % 4)
    temperature, top_p, min_p, typical_p, top_k = SamplingParams(**WARPERS[name][0]).filters
    kept, _ = kept_tokens(logits[0] / temperature, top_k, top_p, min_p, typical_p)
    assert sorted(kept.tolist()) == np.flatnonzero(warped(name, logits)[0] > -np.inf).tolist()


@pytest.mark.parametrize("name", WARPERS)
def test_frequencies_of_sampled_tokens_pass_a_chi_square_test(name: str) -> None:
    """Through the packed step and a kernel: the draws of one seed at successive positions."""
    vocab, rows, steps = 40, 64, 150
    logits = np.random.default_rng(1).standard_normal((1, vocab)) * 1.5
    shares = torch.softmax(torch.from_numpy(warped(name, logits)), -1).numpy()[0]
    counts = np.zeros(vocab)
    params = [SamplingParams(seed=77, **WARPERS[name][0])] * rows
    for step in range(steps):
        host = pack_sampling(params, [0] * rows, range(step * rows, (step + 1) * rows), rows)
        assert host is not None
        given = {key: torch.from_numpy(view) for key, view in host.views.items()}
        problem = SampleProblem(dtype="float32", rows=rows, vocab=vocab, typical="typical_p" in host.views)
        ids = sample(problem, torch.from_numpy(logits).float().expand(rows, vocab), given, given["u"])
        counts += np.bincount(ids.numpy(), minlength=vocab)
    kept = shares > 0
    assert counts[~kept].sum() == 0
    expected = shares[kept] * rows * steps
    chi_square = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 10  # exceeded about once in ten thousand seeds
