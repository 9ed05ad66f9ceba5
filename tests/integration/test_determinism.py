"""The same seed gives the same random numbers, and so the same tokens, whatever else the engine does at the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.integration.conftest import Checkpoint, Llama
from tests.integration.driving import Run, config, drive

import lineshaft.sampling.pack as pack
from lineshaft.engine import Engine
from lineshaft.sampling.params import SamplingParams

LENGTHS = (3, 11, 20, 6)
TOKENS = 10

ROOMY = {"max_model_len": 36, "cache.pages": 64, "cache.page_size": 4, "scheduler.token_budget": 32}
CRAMPED = {"max_model_len": 36, "cache.pages": 10, "cache.page_size": 4, "scheduler.token_budget": 8}


def sampled() -> list[SamplingParams]:
    """Four ways to draw, one for each prompt; the last is greedy."""
    return [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_tokens=TOKENS, ignore_eos=True)
        for temperature, top_k, top_p, seed in (
            (1.0, 0, 1.0, 5),
            (0.7, 40, 1.0, 6),
            (1.5, 0, 0.9, 2**64 - 1),
            (0, 0, 1, 8),
        )
    ]


def run_on(checkpoint: Checkpoint, settings: dict[str, Any], which: Sequence[int], **more: Any) -> Run:
    prompts = checkpoint.oracle.prompts(2, LENGTHS)
    with Engine(config(checkpoint.path, **settings, **more)) as engine:
        return drive(engine, [prompts[i] for i in which], [sampled()[i] for i in which], look=False)


def test_neither_batch_nor_chunks_nor_preemption_change_what_is_sampled(llama: Llama) -> None:
    checkpoint = llama("gqa3-tied")
    alone = [run_on(checkpoint, ROOMY, [i], backend="numpy", dtype="float64").tokens[0] for i in range(len(LENGTHS))]
    together = run_on(checkpoint, ROOMY, range(len(LENGTHS)), backend="numpy", dtype="float64")
    cramped = run_on(checkpoint, CRAMPED, range(len(LENGTHS)), backend="numpy", dtype="float64")
    assert together.preemptions == 0 < cramped.preemptions
    assert together.tokens == alone
    assert cramped.tokens == alone
    assert len({tuple(tokens) for tokens in alone}) == len(LENGTHS)


def test_random_numbers_depend_on_seed_and_position_alone(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[tuple[int, ...], float]] = []
    draws = pack.draws

    def spy(seeds: Sequence[int], forks: Sequence[int], positions: Sequence[int], purpose: int, index: int) -> Any:
        made = draws(seeds, forks, positions, purpose, index)
        places = [(*place, purpose, index) for place in zip(seeds, forks, positions, strict=True)]
        drawn.extend(zip(places, map(float, made), strict=True))
        return made

    monkeypatch.setattr(pack, "draws", spy)
    seen = []
    for settings in (ROOMY, CRAMPED):
        drawn.clear()
        run_on(llama("gqa3-tied"), settings, range(len(LENGTHS)))
        seen.append(dict(drawn))
    assert seen[0] == seen[1]
    places = [(5, 3), (6, 11), (2**64 - 1, 20)]  # (seed, length of the prompt); the greedy one draws nothing
    wanted = {(seed, 0, length + i, 0, 0) for seed, length in places for i in range(TOKENS)}
    assert set(seen[0]) == wanted
    assert len(set(seen[0].values())) == len(wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_run_twice_on_the_cpu(llama: Llama, dtype: str) -> None:
    first, second = (run_on(llama("gqa8"), CRAMPED, range(len(LENGTHS)), dtype=dtype) for _ in range(2))
    assert first.preemptions == second.preemptions > 0
    assert first.tokens == second.tokens


def test_an_engine_does_not_remember(llama: Llama) -> None:
    """A second batch in the same engine, its pages full of the first one's values, gives the same tokens."""
    checkpoint = llama("gqa1")
    prompts = checkpoint.oracle.prompts(2, LENGTHS)
    with Engine(config(checkpoint.path, **CRAMPED)) as engine:
        first, second = (drive(engine, prompts, sampled(), look=False) for _ in range(2))
    assert first.tokens == second.tokens


def test_unseeded_requests_follow_the_engines_seed(llama: Llama) -> None:
    checkpoint = llama("gqa1")
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    tokens = []
    for seed in (1, 1, 2):
        with Engine(config(checkpoint.path, seed=seed, **ROOMY)) as engine:
            tokens.append(drive(engine, checkpoint.oracle.prompts(2, [4, 4]), params, look=False).tokens)
    assert tokens[0] == tokens[1] != tokens[2]
