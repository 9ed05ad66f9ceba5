"""Packed weights: an update reaches the products, and a tied table stays dense because the lookup needs it so."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from lineshaft.contract.backends import World
from lineshaft.contract.problems import EmbedProblem, LinearProblem
from lineshaft.contract.sessions import Packing
from lineshaft.contract.weights import Local, Param, Stored
from lineshaft.plan.resolve import Resolver, joint_layout
from lineshaft_cpu.backend import create
from lineshaft_cpu.options import CpuOptions
from lineshaft_cpu.packed import BLOCKED, linear, pack
from lineshaft_torch.bound import DENSE
from lineshaft_torch.session import TorchSession

LINEAR = LinearProblem(dtype="bfloat16", n=48, k=32)


def param(values: Any) -> Param:
    stored = Stored("none", values.shape, {"data": values})
    return Param("w", "w", values.shape, "bfloat16", {"linear": LINEAR}, lambda checkpoint, at: Local((stored,)))


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


def test_the_packing_is_chosen_jointly() -> None:
    resolver = Resolver("cpu", create(CpuOptions(), World()).kernels(), {})
    products = [resolver.candidates("linear", LinearProblem(dtype="bfloat16", n=48, k=32, m=m)) for m in (1, 8, 512)]
    assert joint_layout(products, "w") == BLOCKED
    lookup = resolver.candidates("embed", EmbedProblem(dtype="bfloat16", vocab=48, width=32, rows=8))
    assert joint_layout([*products, lookup], "w") == DENSE
