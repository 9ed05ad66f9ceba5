"""Which config.json families read, and that they refuse one that they would compute differently."""

from __future__ import annotations

from typing import Any

import pytest

from lineshaft.errors import UnknownArchitecture
from lineshaft.layout import Degrees
from lineshaft.models import BuildContext, llama
from lineshaft.models.decoder import Decoder

CONTEXT = BuildContext("float32", "float32", 16, Degrees())
PLAIN: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128, "num_hidden_layers": 2,
}  # fmt: skip

NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": None, "partial_rotary_factor": 1,
    "sliding_window": 0, "quantization_config": {}, "rope_parameters": {"partial_rotary_factor": 1.0},
}  # fmt: skip


def described(model: Decoder) -> tuple[Any, ...]:
    return model.sizes, model.layers, model.uses(), model.caches()


def test_keys_that_change_nothing_are_read_over() -> None:
    assert described(llama.build(PLAIN | NEUTRAL, CONTEXT)) == described(llama.build(PLAIN, CONTEXT))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; .* = 1.0 only"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor is 0;"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5;"),
        ({"attention_bias": True}, "attention_bias is True; .* = false only"),
        ({"mlp_bias": True}, "mlp_bias is True;"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; .* = \"silu\" only"),
        ({"sliding_window": 4096}, "sliding_window is 4096; .* = null only"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4};"),
    ],
    ids=str,
)
def test_a_key_that_changes_what_is_computed_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownArchitecture, match=words):
        llama.build(PLAIN | changed, CONTEXT)
