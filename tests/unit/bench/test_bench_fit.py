"""A cost model is found again from steps that follow it, with noise and outliers, and survives a file."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from lineshaft.runner.messages import StepMessage
from lineshaft_bench.errors import DeviceError
from lineshaft_bench.simulator.cost import Load
from lineshaft_bench.simulator.fit import Sample, bucket_of, fit_cost, load_in, read_cost, to_json
from lineshaft_contract.steps import HostStep, StepShape, forward_inputs

DECODE = [StepShape(n, n, (8,), n, 1) for n in (1, 2, 4, 8)]
MIXED = [StepShape(tokens, 8, (8,), 8, tokens) for tokens in (16, 64)]
SHAPES = (*DECODE, *MIXED)


def truth(load: Load, shape: StepShape) -> float:
    """Stairs over the buckets, and a price for each token of context."""
    return 0.004 + 0.001 * shape.rows + 0.0002 * shape.tokens + 1e-6 * load.context


def sampled(seed: int, noise: float, outliers: float = 0.0) -> list[Sample]:
    rng, made = Random(seed), []
    for _ in range(600):
        shape = rng.choice(SHAPES)
        rows = rng.randint(shape.rows // 2 + 1, shape.rows)
        context = rng.randint(rows, 100 * rows)
        load = Load(rows, rows if shape.max_query == 1 else shape.tokens - 3, context, float(context), rows, 1)
        seconds = truth(load, shape) * rng.gauss(1, noise) * (10 if rng.random() < outliers else 1)
        made.append(Sample(bucket_of(shape), load, seconds))
    return made


@pytest.mark.parametrize(("noise", "outliers", "bar"), [(0.0, 0.0, 1e-6), (0.05, 0.0, 0.03), (0.05, 0.1, 0.05)])
def test_the_prices_are_found_again(noise: float, outliers: float, bar: float) -> None:
    found = fit_cost(sampled(1, noise, outliers), SHAPES)
    for sample in sampled(2, 0.0):
        assert found.seconds_in(sample.bucket, sample.load) == pytest.approx(sample.seconds, rel=bar)


def test_a_step_costs_what_the_bucket_costs_that_the_engine_would_take() -> None:
    found = fit_cost(sampled(1, 0.0), SHAPES)
    assert found.seconds(Load(3, 3, 30, 30, 3, 1)) == pytest.approx(truth(Load(3, 3, 30, 30, 3), DECODE[2]))
    assert found.seconds(Load(3, 20, 30, 30, 2, 18)) == pytest.approx(truth(Load(3, 20, 30, 30, 3), MIXED[1]))


def test_a_bucket_that_was_not_seen_is_guessed_from_the_others() -> None:
    kept = [sample for sample in sampled(1, 0.0) if sample.bucket != bucket_of(DECODE[2])]
    load = Load(3, 3, 30, 30, 3, 1)
    assert fit_cost(kept, SHAPES).seconds(load) == pytest.approx(truth(load, DECODE[2]), rel=0.1)


def test_no_price_is_negative() -> None:
    """Steps that get quicker with more context, by chance, are not priced below nothing."""
    made = [Sample((1, 1, 1), Load(1, 1, n, n, 1), 0.01 - 1e-5 * n) for n in range(1, 100)]
    found = fit_cost(made, SHAPES)
    assert min(found.slopes.values()) >= 0
    assert found.seconds(Load(1, 1, 10**6, 10.0**6, 1)) > 0


def test_a_cost_model_survives_a_file(tmp_path: Path) -> None:
    found = fit_cost(sampled(1, 0.05), SHAPES)
    file = tmp_path / "cost.json"
    file.write_text(json.dumps(to_json(found)))
    assert read_cost(file) == found


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", "{}", '{"buckets": [[1]], "shapes": [], "slopes": {}, "plain": {}}']
)
def test_a_file_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    file.write_text(text)
    with pytest.raises(DeviceError):
        read_cost(file)
    with pytest.raises(DeviceError, match="nowhere"):
        read_cost(tmp_path / "nowhere.json")


def test_the_load_of_a_packed_step_leaves_padding_out() -> None:
    shape = StepShape(16, 4, (8,), 4, 16)
    host = HostStep(forward_inputs(shape))
    host["query_starts"][:] = [0, 1, 6, 6, 6]
    host["context_lens.0"][:] = [40, 25, 0, 0]
    load = load_in(StepMessage(shape, host, np.zeros((0, 3), np.int32)))
    assert load == Load(rows=2, tokens=6, context=65, pairs=40 + 21 + 22 + 23 + 24 + 25, logits=0, longest=5)
