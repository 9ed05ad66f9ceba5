"""Which config.json families read, and that they refuse one that they would compute differently."""

from __future__ import annotations

from typing import Any

import pytest

from lineshaft.errors import CorruptCheckpoint, UnknownArchitecture
from lineshaft.layout import Degrees
from lineshaft.models import BuildContext, builtin_families
from lineshaft.models.attention import Attention
from lineshaft.models.decoder import Decoder, Layer
from lineshaft.models.mlp import GatedMlp
from lineshaft.models.parameters import RmsNorm
from lineshaft.models.reading import FULL, SLIDING, Sizes

FAMILIES = {family.name: family for family in builtin_families()}
CONTEXT = BuildContext("float32", "float32", 16, Degrees())
PLAIN: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 128, "num_hidden_layers": 2,
}  # fmt: skip

NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": None, "partial_rotary_factor": 1,
    "sliding_window": 0, "quantization_config": {}, "rope_parameters": {"partial_rotary_factor": 1.0},
}  # fmt: skip


def described(model: Any) -> tuple[Any, ...]:
    return model.sizes, model.layers, model.uses(), model.caches()


def test_keys_that_change_nothing_are_read_over() -> None:
    assert described(FAMILIES["llama"].build(PLAIN | NEUTRAL, CONTEXT)) == described(
        FAMILIES["llama"].build(PLAIN, CONTEXT)
    )


@pytest.mark.parametrize(
    ("family", "changed", "words"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; the llama family .* = 1.0 only"),
        ("llama", {"partial_rotary_factor": 0}, "partial_rotary_factor is 0;"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5;"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act is \\['silu'\\]; known are"),
        ("llama", {"hidden_act": 0}, "hidden_act is 0; known are"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; known are silu, gelu_pytorch_tanh"),
        ("llama", {"sliding_window": 4096}, "sliding_window is 4096; .* = null only"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4};"),
        ("mistral", {"layer_types": [FULL, SLIDING]}, "layer_types is .* the mistral family"),
        ("mistral", {"attention_bias": True}, "attention_bias is True; the mistral family"),
        ("qwen2", {"layer_types": [FULL, "chunked_attention"]}, "layer type 'chunked_attention'"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "the qwen3 family"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; the gemma3 family"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("phi3", {"attention_bias": True}, "attention_bias is True; the phi3 family"),
        ("phi3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'; known .* grows .* fixed one"),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "mrope"}},
            "'mrope'; known are default, linear, llama3, yarn, longrope",
        ),
    ],
    ids=str,
)
def test_a_key_that_changes_what_is_computed_is_refused(family: str, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownArchitecture, match=words):
        FAMILIES[family].build(PLAIN | changed, CONTEXT)


@pytest.mark.parametrize(
    ("family", "changed", "words"),
    [
        ("llama", {"rope_theta": 0}, "rope_theta is 0, it must be a finite number above 0"),
        ("llama", {"hidden_size": None}, "hidden_size is None, it must be a whole number"),
        ("llama", {"num_key_value_heads": 3}, "3 kv heads do not divide 4"),
        ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes', it must be true or false"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0, it must be a finite number"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling is .* it must be a table"),
        ("qwen2", {"layer_types": [FULL]}, "layer_types is .* each of 2 layers"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window is 'wide'"),
        (
            "phi3",
            {"rope_scaling": {"rope_type": "longrope", "long_factor": "x", "short_factor": [1.0]}},
            "long_factor is 'x', it must be a list of numbers",
        ),
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_refused(family: str, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=words):
        FAMILIES[family].build(PLAIN | changed, CONTEXT)


@pytest.mark.parametrize(
    ("family", "more", "expected"),
    [
        ("llama", {}, [0, 0, 0, 0]),
        ("mistral", {}, [4096] * 4),  # what transformers takes where the key is absent
        ("mistral", {"sliding_window": None}, [0] * 4),
        ("mistral", {"sliding_window": 7}, [7] * 4),
        ("qwen2", {"sliding_window": 7}, [0] * 4),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3}, [0, 0, 0, 7]),
        ("qwen3", {"sliding_window": 7, "use_sliding_window": True, "layer_types": [SLIDING, FULL] * 2}, [7, 0, 7, 0]),
        ("phi3", {}, [0] * 4),
        ("phi3", {"sliding_window": 7}, [7] * 4),
        ("gemma3", {"sliding_window": 7, "sliding_window_pattern": 3}, [7, 7, 0, 7]),
        ("gemma3", {"sliding_window": 7, "layer_types": [FULL, SLIDING, SLIDING, FULL]}, [0, 7, 7, 0]),
    ],
    ids=str,
)
def test_layers_of_one_window_share_a_cache_group(family: str, more: dict[str, Any], expected: list[int]) -> None:
    model: Any = FAMILIES[family].build({**PLAIN, "num_hidden_layers": 4, "num_key_value_heads": 2, **more}, CONTEXT)
    assert [layer.attention.window for layer in model.layers] == expected
    numbers = {window: number for number, window in enumerate(dict.fromkeys(expected))}
    assert [cache.group for cache in model.caches()] == [numbers[window] for window in expected]
    attends = {problem.window: problem.group for op, problem in model.uses().values() if op == "attend"}
    assert attends == numbers


def test_two_blocks_must_not_call_two_problems_by_one_name() -> None:
    sizes = Sizes.read(PLAIN)
    norm = RmsNorm(CONTEXT, 64, 1e-5)
    mlp = GatedMlp(context=CONTEXT, hidden=64, width=128)
    fields: dict[str, Any] = {"context": CONTEXT, "shape": sizes.shape, "head_dim": 16, "max_position": 32}
    blocks = [Attention(**fields, rope=None), Attention(**fields, rope=None, softcap=5.0)]
    with pytest.raises(AssertionError, match="two problems are called 'attend'"):
        Decoder(CONTEXT, sizes, [Layer(block, mlp, norm) for block in blocks], norm).uses()
