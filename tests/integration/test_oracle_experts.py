"""Random models of experts agree with transformers, however their steps are cut, preempted, shared, mixed and spread
over ranks, and wherever their routers send the tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integration.checkpoints import EXPERTS
from tests.integration.conftest import Checkpoint, Llama
from tests.integration.driving import TPU_ON_CPU, config, drive, follow, greedy
from tests.integration.oracle import (
    Expected,
    Oracle,
    check_float32,
    check_most_of_bfloat16,
    float32_tolerance,
    make_model,
    undisputed,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lineshaft.engine import Engine
from lineshaft.errors import LayoutError, Unsupported

LENGTHS = (1, 7, 16, 33)
TOKENS = 12

ROOMY = {"max_model_len": 96, "cache.pages": 64, "cache.page_size": 16}
CRAMPED = {"max_model_len": 60, "cache.pages": 13, "cache.page_size": 5, "scheduler.token_budget": 8}

FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v2")


def full(variant: str) -> Any:
    return pytest.param(variant, marks=pytest.mark.full)


@pytest.fixture(scope="module", params=EXPERTS)
def checkpoint(request: pytest.FixtureRequest, llama: Llama) -> Checkpoint:
    return llama(request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[Expected]:
    return expect(checkpoint.oracle)


@pytest.fixture(scope="module")
def roomy(checkpoint: Checkpoint) -> Iterator[Engine]:
    with Engine(config(checkpoint.path, overlap="off", **ROOMY)) as engine:
        yield engine


def expect(oracle: Oracle) -> list[Expected]:
    return [oracle.expect(prompt, TOKENS) for prompt in oracle.prompts(0, LENGTHS)]


def test_a_batch_that_decodes_and_prefills_at_once(roomy: Engine, expected: list[Expected]) -> None:
    run = follow(roomy, expected, arrivals=[0, 3, 5, 6])
    assert run.mixed_steps > 0
    check_float32(expected, run.logits)


def test_a_prompt_whose_prefix_is_cached(roomy: Engine, expected: list[Expected]) -> None:
    first, again = (follow(roomy, expected[-1:], salt=b"shared prefix") for _ in range(2))
    assert (first.requests[0].cached, again.requests[0].cached) == (0, 32)  # of 33 tokens, the whole pages
    check_float32(expected[-1:], again.logits)


def test_the_tokens_are_the_oracles_without_being_led(roomy: Engine, expected: list[Expected]) -> None:
    run = drive(roomy, [item.prompt for item in expected], greedy(TOKENS), look=False)
    sure = undisputed(expected, float32_tolerance(expected))
    assert [tokens[: len(known)] for tokens, known in zip(run.tokens, sure, strict=True)] == sure
    assert sum(map(len, sure)) >= len(expected) * TOKENS * 0.9


def test_chunked_and_preempted_prompts(checkpoint: Checkpoint, expected: list[Expected]) -> None:
    cramped = CRAMPED | ({"cache.pages": 8} if checkpoint.path.name.startswith("mixtral") else {})  # windows alone
    with Engine(config(checkpoint.path, overlap="off", **cramped)) as engine:
        run = follow(engine, expected)
        assert engine.metrics().preemptions == run.preemptions > 0
    check_float32(expected, run.logits)


@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16(llama: Llama, variant: str) -> None:
    oracle = llama(variant).oracle
    with Engine(config(llama(variant).path, dtype="bfloat16", **ROOMY)) as engine:
        run = follow(engine, expected := expect(oracle), arrivals=[0, 3, 5, 6])
    check_most_of_bfloat16(expected, run.logits, oracle.bfloat16())


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_reference_runs_the_same_forward(llama: Llama, variant: str) -> None:
    expected = expect(llama(variant).oracle)[:3]
    with Engine(config(llama(variant).path, backend="numpy", **CRAMPED)) as engine:
        check_float32(expected, follow(engine, expected).logits)


# ---- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
def test_two_ranks_share_every_expert(llama: Llama, variant: str) -> None:
    expected = expect(llama(variant).oracle)
    with Engine(config(llama(variant).path, **CRAMPED, **{"layout.tp": 2})) as engine:
        check_float32(expected, follow(engine, expected, arrivals=[0, 2, 2, 3]).logits)


@pytest.mark.parametrize("variant", [*map(full, ("mixtral", "qwen3-moe")), "gpt-oss", "deepseek-v2"])
def test_two_ranks_in_one_program(llama: Llama, variant: str) -> None:
    expected = expect(llama(variant).oracle)[1:3]
    few = {"scheduler.token_budget": 16, "scheduler.max_rows": 2, "layout.tp": 2}
    with Engine(config(llama(variant).path, **{**TPU_ON_CPU, **CRAMPED, **few})) as engine:
        check_float32(expected, follow(engine, expected, arrivals=[0, 1]).logits)


def test_a_degree_that_does_not_divide_an_expert_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path, **{**EXPERTS["qwen3-moe"], "moe_intermediate_size": 25})
    with pytest.raises(LayoutError, match="tp=2 does not divide the experts' width 25"):
        Engine(config(tmp_path, **ROOMY, **{"layout.tp": 2}))


def test_quantized_experts_are_refused(llama: Llama) -> None:
    with pytest.raises(Unsupported, match=r"grouped_mlp.*does not handle .*scheme"):
        Engine(config(llama("mixtral").path, quantization="int8", **ROOMY))


# ---- routers -----------------------------------------------------------------------------------------------------


def routed(oracle: Oracle, expected: list[Expected]) -> list[set[int]]:
    """The experts that each layer's router chooses for any token."""
    seen: list[set[int]] = [set() for _ in oracle.model.model.layers]

    def watch(layer: int) -> Any:
        return lambda module, given, out: seen[layer].update(out[2].flatten().tolist())

    layers = enumerate(oracle.model.model.layers)
    hooks = [layer.mlp.router.register_forward_hook(watch(i)) for i, layer in layers]
    for item in expected:
        oracle.logits([*item.prompt, *item.tokens])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("k", [1, 2])
def test_experts_that_get_every_token_and_experts_that_get_none(tmp_path: Path, k: int) -> None:
    favoured = torch.tensor([0.0, -900.0, 0.0, 900.0, 0.0])

    def force(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.router.bias.data += favoured

    oracle = make_model(tmp_path, change=force, **{**EXPERTS["gpt-oss"], "num_experts_per_tok": k})
    expected = expect(oracle)
    for chosen in routed(oracle, expected):
        assert 3 in chosen and 1 not in chosen and (k == 2 or len(chosen) == 1)
    with Engine(config(tmp_path, **CRAMPED)) as engine:
        check_float32(expected, follow(engine, expected).logits)


def test_every_expert_gets_every_token(tmp_path: Path) -> None:
    expected = expect(make_model(tmp_path, **{**EXPERTS["mixtral"], "num_experts_per_tok": 5}))
    with Engine(config(tmp_path, **ROOMY)) as engine:
        check_float32(expected, follow(engine, expected).logits)


# ---- MXFP4 -------------------------------------------------------------------------------------------------------


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    """The checkpoint holds codes and scales of four bits; the oracle is given what transformers decodes from them."""
    rng = np.random.default_rng(3)
    packed: dict[str, torch.Tensor] = {}

    def quantize(model: Any) -> None:
        for i, layer in enumerate(model.model.layers):
            for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
                blocks = torch.from_numpy(rng.integers(0, 256, (5, rows, 2, 16), dtype=np.uint8))
                scales = torch.from_numpy(rng.integers(121, 125, (5, rows, 2), dtype=np.uint8))
                packed[key := f"model.layers.{i}.mlp.experts.{name}_blocks"] = blocks
                packed[key.replace("_blocks", "_scales")] = scales
                decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
                getattr(layer.mlp.experts, name).data = decoded

    expected = expect(make_model(tmp_path, change=quantize, **{**EXPERTS["gpt-oss"], "intermediate_size": 64}))
    kept = load_file(tmp_path / "model.safetensors")
    plain = {name: tensor for name, tensor in kept.items() if f"{name}_blocks" not in packed}
    save_file(plain | packed, tmp_path / "model.safetensors")
    told = json.loads((tmp_path / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for degrees in ({}, {"layout.tp": 2}):
        with Engine(config(tmp_path, **ROOMY, **degrees)) as engine:
            check_float32(expected, follow(engine, expected).logits)
