"""Sampling on the host keeps what the op's rules keep, on vocabularies too large to sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lineshaft_contract.ops.logits import kept_tokens
from lineshaft_contract.problems import SampleProblem
from lineshaft_cpu import sampling

PLAIN = SampleProblem(dtype="float32", vocab=0)
"""The kernel reads of its problem only whether rows have a typical_p."""

FILTERS = [
    (0, 0.0, 0.0), (1, 0.0, 0.0), (50, 0.0, 0.0), (50, 0.5, 0.0), (0, 0.9, 0.0), (0, 0.999, 0.0), (0, 0.0, 0.02),
    (0, 0.95, 0.001), (2000, 0.99, 0.01), (10**6, 1.0, 0.0), (3, 1e-6, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("kind", ["normal", "ties", "masked", "peaked"])
def test_the_kept_set_is_the_references(kind: str, filters: tuple[int, float, float]) -> None:
    x = np.random.default_rng(3).standard_normal(5000) * (8.0 if kind == "peaked" else 2.0)
    if kind == "ties":
        x = np.round(x)
    if kind == "masked":
        x[::3] = -np.inf
    weights = np.exp(x - x.max())
    kept = sampling._kept(x, weights, *filters)
    expected = np.sort(kept_tokens(x, *filters)[0])
    assert np.array_equal(np.flatnonzero(weights) if kept is None else kept, expected)


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    rows = 4096
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).expand(rows, 4)
    one = torch.ones(rows)
    params = {"temperature": one, "top_k": one.int() * 0, "top_p": one * 0, "min_p": one * 0}
    u = (torch.arange(rows)[:, None] + 0.5) / rows
    counts = torch.bincount(sampling.sample(PLAIN, logits, params, u).long(), minlength=4) / rows
    assert torch.allclose(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=1e-3)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 900, generator=rng).bfloat16()
    params = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 0.0, 1.3, 1.0]), "top_k": torch.tensor([0, 0, 9, 5, 0, 0]).int(),
        "top_p": torch.tensor([0.0, 0.9, 0.0, 0.0, 0.5, 0.0]), "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0]),
    }  # fmt: skip
    u = torch.rand(6, 1, generator=rng)
    together = sampling.sample(PLAIN, logits, params, u)
    for r in range(6):
        alone = sampling.sample(PLAIN, logits[r : r + 1], {k: v[r : r + 1] for k, v in params.items()}, u[r : r + 1])
        assert alone.tolist() == together[r : r + 1].tolist()
    assert together[0] == logits[0].argmax() and together[3] == logits[3].argmax()
