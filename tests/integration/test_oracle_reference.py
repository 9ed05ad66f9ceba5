"""The NumPy reference agrees with transformers, and the CPU backend with the reference: one forward, neutral arrays."""

from __future__ import annotations

import pytest
from tests.integration.conftest import Llama
from tests.integration.driving import config, drive, follow, greedy
from tests.integration.oracle import check_bfloat16, check_float32

from lineshaft.engine import Engine

LENGTHS = (2, 9, 30)
TOKENS = 6

SMALL = {
    "scheduler.token_budget": 16, "scheduler.max_rows": 2, "max_model_len": 40, "cache.pages": 12, "cache.page_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["gqa3-tied", "llama3-rope"])
def test_the_reference_agrees_with_transformers(llama: Llama, variant: str, dtype: str) -> None:
    oracle = llama(variant).oracle
    expected = [oracle.expect(prompt, TOKENS) for prompt in oracle.prompts(0, LENGTHS)]
    with Engine(config(llama(variant).path, backend="numpy", dtype=dtype, **SMALL)) as engine:
        run = follow(engine, expected, arrivals=[0, 2, 3])
    assert run.mixed_steps > 0
    if dtype == "bfloat16":
        check_bfloat16(expected, run.logits, oracle.bfloat16(), least_decided=0.3)
    else:
        check_float32(expected, run.logits)


@pytest.mark.parametrize("variant", ["gqa1", "gqa3-tied", "gqa8", "linear-rope"])
def test_the_same_forward_gives_the_same_tokens_on_both_backends(llama: Llama, variant: str) -> None:
    """The reference's arrays refuse whatever the contract does not allow: this is what keeps the forward neutral."""
    prompts = llama(variant).oracle.prompts(1, LENGTHS)
    tokens = {}
    for backend in ("numpy", "cpu"):
        with Engine(config(llama(variant).path, backend=backend, **SMALL)) as engine:
            tokens[backend] = drive(engine, prompts, greedy(TOKENS), look=False).tokens
    assert tokens["numpy"] == tokens["cpu"]
    assert all(len(output) == TOKENS for output in tokens["cpu"])
