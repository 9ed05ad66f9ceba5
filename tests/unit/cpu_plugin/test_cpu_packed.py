"""Packed weights: an update reaches the products, and a tied head is packed although the lookup's table is dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lineshaft.layout import Degrees
from lineshaft.models import BuildContext, llama
from lineshaft.plan import Workload, make_plan
from lineshaft.plan.resolve import Resolver, joint_layout
from lineshaft.runner.programs import all_programs
from lineshaft_contract.backends import World
from lineshaft_contract.ops import all_ops
from lineshaft_contract.problems import EmbedProblem, LinearProblem
from lineshaft_contract.sessions import Packing
from lineshaft_contract.steps import StepShape
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_cpu.backend import create
from lineshaft_cpu.options import CpuOptions
from lineshaft_cpu.packed import BLOCKED, linear, pack, supports
from lineshaft_torch.bound import DENSE
from lineshaft_torch.session import TorchSession

LINEAR = LinearProblem(dtype="bfloat16", n=48, k=32)


def param(values: Any) -> Param:
    stored = Stored("none", values.shape, {"data": values})
    return Param("w", "w", values.shape, "bfloat16", {"linear": LINEAR}, lambda checkpoint, at: Local((stored,)))


def test_bfloat16_is_declined_on_processors_that_torch_packs_none_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "AVX-512" in str(supports(LINEAR))
    assert supports(replace(LINEAR, dtype="float32")) is None


def test_an_update_reaches_packed_weights() -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.standard_normal((48, 32)).astype(ml_dtypes.bfloat16) for _ in range(2))
    session = TorchSession()
    weight = session.load(param(old), None, {"w": Packing(BLOCKED, pack)})
    x = torch.eye(32, dtype=torch.bfloat16)
    assert np.array_equal(linear(x, weight).float().numpy().T, old.astype(np.float32))
    session.update({"w": new})
    assert np.array_equal(linear(x, weight).float().numpy().T, new.astype(np.float32))
    assert session.tensors() == []  # opaque: no memory that a tape could point at


def test_an_update_of_a_tied_table_reaches_the_packed_head_and_the_dense_lookup() -> None:
    rng = np.random.default_rng(0)
    old, *new = (rng.standard_normal((48, 32)).astype(ml_dtypes.bfloat16) for _ in range(3))
    params = [replace(param(old), name=name) for name in ("embed", "head")]
    session = TorchSession()
    embed, head = session.load(params, None, {"embed": Packing(DENSE), "head": Packing(BLOCKED, pack)})
    where = embed.arrays["data"].data_ptr()
    for name, values in zip(("embed", "head"), new, strict=True):
        session.update({name: values})
        expected = values.astype(np.float32)
        assert np.array_equal(embed.arrays["data"].float().numpy(), expected)
        assert np.array_equal(linear(torch.eye(32, dtype=torch.bfloat16), head).float().numpy().T, expected)
    assert embed.arrays["data"].data_ptr() == where


def test_a_tied_head_is_packed_and_its_lookup_dense() -> None:
    config = {
        "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40,
        "num_hidden_layers": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    backend = create(CpuOptions(engine="torch"), World())
    model = llama.FAMILY.build(config, BuildContext("bfloat16", "bfloat16", 16, Degrees()))
    programs = all_programs(model, [StepShape(2, 2, (1,), 2, 1)], "bfloat16", 0)
    work = Workload(model.params(), model.caches(), model.uses(), programs, {})
    made = make_plan("cpu", work, Resolver("cpu", backend.kernels(), {}), all_ops()).plan
    assert (made.weight_layouts["embed"], made.weight_layouts["head"]) == (DENSE, BLOCKED)
    assert made.notes[1:] == (f"embed and head hold one tensor in 2 packings: {DENSE}, {BLOCKED} (+2560 bytes)",)


def test_the_packing_of_one_parameter_is_chosen_jointly() -> None:
    resolver = Resolver("cpu", create(CpuOptions(engine="torch"), World()).kernels(), {})
    products = [resolver.candidates("linear", LinearProblem(dtype="bfloat16", n=48, k=32, m=m)) for m in (1, 8, 512)]
    assert joint_layout(products, "w") == BLOCKED
    lookup = resolver.candidates("embed", EmbedProblem(dtype="bfloat16", vocab=48, width=32, rows=8))
    assert joint_layout([*products, lookup], "w") == DENSE
