"""A model's programs compiled for TPUs that are not here: every topology, donated caches, memory that suffices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lineshaft.config import make_config
from lineshaft.errors import OutOfMemory
from lineshaft_conformance.ahead import Compiled, compile_ahead

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 500,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
EIGHT_B = SMALL | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip

TOPOLOGIES = {"v5e:1x1": 1, "v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x4": 8, "tpu7x:2x2x1": 8}
"""Each with the ranks to put on it."""


def compiled(folder: Path, model: dict[str, Any], topology: str, tp: int, *only: str, **more: Any) -> Compiled:
    (folder / "config.json").write_text(json.dumps(model))
    settings = {"scheduler.max_rows": 8, "scheduler.token_budget": 16, "layout.tp": tp, **more}
    config = make_config(model=str(folder), backend="tpu", dtype="bfloat16", **settings)
    return compile_ahead(config, topology, only)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_program_of_a_small_model_compiles(tmp_path: Path, topology: str) -> None:
    found = compiled(tmp_path, SMALL, topology, TOPOLOGIES[topology])
    names = [program.label for program in found.programs]
    over_logits = ("sample", "logprobs", "sample_typical", "mask", "edit_64", "edit_1024")
    assert names == ["forward/t16-b8-r8-q16", "forward/t8-b8-r8-q1", *(f"{name}/b8-r8" for name in over_logits)]
    kernels = {entry.kernel for entry in found.plan.entries}
    assert kernels >= {"pallas_attend", "pallas_write_kv"}
    for program in found.programs[:2]:
        assert program.report.aliased == found.pool
        assert bool(program.report.collectives) == (TOPOLOGIES[topology] > 1)
    assert not any(program.report.cache_copied for program in found.programs)
    found.require_fit()


def test_a_decode_step_of_8b_on_eight_chips_copies_no_cache(tmp_path: Path) -> None:
    found = compiled(tmp_path, EIGHT_B, "v5e:2x4", 8, "forward/*-q1")
    (program,) = found.programs
    report = program.report
    print(f"{program.label}: {report.seconds:.1f} s, temporaries {report.temporaries / 1e6:.1f} MB")
    assert report.aliased == found.pool > 10**9
    assert report.temporaries < 10**8
    assert report.cache_copied == 0


def test_what_does_not_fit_says_by_how_much(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"15\.75 GiB are free: \d+\.\d+ GiB too much"):
        compiled(tmp_path, EIGHT_B, "v5e:2x4", 8, **{"cache.pages": 60000})
