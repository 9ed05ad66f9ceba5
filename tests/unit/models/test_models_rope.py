"""Rotary embeddings read from config.json turn as those of transformers, in each kind and each way to write it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lineshaft.layout import Degrees
from lineshaft.models import BuildContext
from lineshaft.models.reading import FULL, SLIDING, rope
from lineshaft_contract.ops.rope import rope_frequencies

DIM, MOST = 64, 1024
FACTORS = {"short_factor": [1.0 + i / 50 for i in range(32)], "long_factor": [1.0 + i for i in range(32)]}
TABLES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn-betas": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16, "beta_slow": 2,
    },
    "yarn-smooth": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 256, "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn-attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 1.5,
    },
    "yarn-by-lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 256},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 256, **FACTORS},
    "longrope-factor": {
        "rope_type": "longrope", "original_max_position_embeddings": 256, "factor": 32.0, **FACTORS,
    },
    "longrope-attention": {
        "rope_type": "longrope", "original_max_position_embeddings": 256, "attention_factor": 1.25, **FACTORS,
    },
}  # fmt: skip


def context(longest: int | None = None) -> BuildContext:
    return BuildContext("float32", "float32", 16, Degrees(), max_model_len=longest)


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("longest", [256, None], ids=["short", "long"])
@pytest.mark.parametrize("name", TABLES)
def test_a_kind(name: str, longest: int | None, older: bool) -> None:
    table = {**TABLES[name], "rope_theta": 5000.0}
    theirs = LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=MOST, rope_parameters=dict(table)
    )
    length = MOST if longest is None else longest
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[table["rope_type"]](theirs, "cpu", seq_len=length)
    if older:
        kind = table.pop("rope_type")
        config = {"rope_theta": table.pop("rope_theta"), "rope_scaling": {"type": kind, **table}}
    else:
        config = {"rope_parameters": table}
    ours = rope({"max_position_embeddings": MOST, **config}, context(longest)).problem("float32", DIM, MOST)
    np.testing.assert_allclose(rope_frequencies(ours), frequencies.numpy(), rtol=1e-5)
    assert ours.attention_factor == pytest.approx(attention_factor)


def test_what_longrope_was_called_before_is_longrope() -> None:
    tables = [{"type": kind, **FACTORS} for kind in ("su", "yarn", "longrope")]
    config = {"max_position_embeddings": MOST, "original_max_position_embeddings": 256}
    found = [rope({**config, "rope_scaling": table}, context()) for table in tables]
    assert found[0] == found[1] == found[2]
    assert found[0].scaling.freq_factors == tuple(FACTORS["long_factor"])


def test_a_table_for_each_type_of_layer() -> None:
    config = {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    full, local = (rope(config, context(), kind) for kind in (FULL, SLIDING))
    assert (full.base, full.scaling.factor, local.base, local.scaling.factor) == (1e6, 8.0, 1e4, 1.0)


@pytest.mark.parametrize(("dim", "head"), [(32, 96), (6, 14), (96, 128), (2, 6)])
def test_a_share_that_is_a_quotient_gives_its_dim_back(dim: int, head: int) -> None:
    assert rope({"partial_rotary_factor": dim / head}, context()).problem("float32", head, 8).dim == dim
