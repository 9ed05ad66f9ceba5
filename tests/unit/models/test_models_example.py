"""The example of a third party's family, installed by its metadata: found by its architecture, and right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.driving import config, follow
from tests.integration.oracle import check_float32, make_model

from lineshaft.engine import Engine
from lineshaft.errors import CorruptCheckpoint, UnknownArchitecture

EXAMPLE = Path(__file__).parents[3] / "examples" / "model_family"
SMOLLM3: dict[str, Any] = {
    "model_type": "smollm3", "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 5,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"no_rope_layers": [0, 1, 1, 0, 1], "tie_word_embeddings": False}], ids=str)
def test_it_agrees_with_transformers(install: Callable[[Path], None], tmp_path: Path, more: dict[str, Any]) -> None:
    oracle = make_model(tmp_path / "model", 40, **SMOLLM3, **more)
    with pytest.raises(UnknownArchitecture, match="'SmolLM3ForCausalLM'"):
        Engine(config(tmp_path / "model"))
    install(EXAMPLE)
    expected = [oracle.expect(prompt, 8) for prompt in oracle.prompts(0, (1, 9, 30))]
    with Engine(config(tmp_path / "model", max_model_len=60, **{"cache.page_size": 5})) as engine:
        run = follow(engine, expected)
    check_float32(expected, run.logits)


def test_it_refuses_what_it_does_not_compute(install: Callable[[Path], None], tmp_path: Path) -> None:
    make_model(tmp_path / "model", 41, **SMOLLM3)
    install(EXAMPLE)
    file = tmp_path / "model" / "config.json"
    right = json.loads(file.read_text())
    for wrong, error, words in (
        ({"use_sliding_window": True}, UnknownArchitecture, "use_sliding_window is True; the smollm3 family"),
        ({"no_rope_layers": [{}, [0], 1, 1, 1]}, CorruptCheckpoint, "no_rope_layers is"),
        ({"no_rope_layers": [1, 0]}, CorruptCheckpoint, "no_rope_layers is"),
    ):
        file.write_text(json.dumps({**right, **wrong}))
        with pytest.raises(error, match=words):
            Engine(config(tmp_path / "model"))
