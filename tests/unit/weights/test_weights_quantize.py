"""The packing of quantized rows: any parts, stored in any way, give the codes of the whole; and what it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as quantize_blocks

from lineshaft.errors import ContractViolation, MisshapenTensor
from lineshaft.weights.memory import local_bytes, quantized
from lineshaft_contract.ops.quantize import quantize_rows
from lineshaft_contract.packing import pack_rows
from lineshaft_contract.problems import LinearProblem
from lineshaft_contract.schemes import dequantize
from lineshaft_contract.weights import Local, Param, Stored

SCHEMES = ("int8", "fp8")


def param(n: int, k: int, scheme: str, dtype: str = "bfloat16", name: str = "w") -> Param:
    problem = LinearProblem(dtype=dtype, n=n, k=k, scheme=scheme)
    return Param(name, name, (n, k), dtype, {"linear": problem}, lambda checkpoint, at: Local(()))


def stored(array: Any) -> Stored:
    return Stored("none", array.shape, {"data": array})


def blocks(array: Any) -> Stored:
    return Stored("q8_0", array.shape, {"data": quantize_blocks(array, GGMLQuantizationType.Q8_0)})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_are_joined_and_rounded_to_the_params_dtype_before_they_are_quantized(scheme: str) -> None:
    w = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    made = pack_rows(scheme)(param(7, 64, scheme), Local((stored(w[:2]), blocks(w[2:6]), stored(w[6:].astype("f8")))))
    whole = np.concatenate([w[:2], dequantize(blocks(w[2:6]), "float32"), w[6:]])
    q, scale = quantize_rows(dequantize(stored(whole), "bfloat16"), scheme)
    assert made.keys() == {"q", "scale"} and made["q"].dtype == q.dtype and made["scale"].dtype == np.float32
    assert made["q"].tobytes() == q.tobytes() and made["scale"].tobytes() == scale.tobytes()


def test_parts_that_do_not_make_up_the_shape_are_refused() -> None:
    for parts in (np.ones((3, 4)), np.ones((2, 5))), (np.ones((3, 4)),), (np.ones((6, 4)),):
        with pytest.raises(MisshapenTensor, match=r"weight w: .* do not make up \[5, 4\]"):
            pack_rows("int8")(param(5, 4, "int8"), Local(tuple(map(stored, parts))))


def test_an_unknown_scheme_has_no_packing() -> None:
    with pytest.raises(ContractViolation, match="'int4'"):
        pack_rows("int4")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_packed_weight_takes_a_byte_a_number_and_four_a_row(scheme: str) -> None:
    small, plain = param(7, 64, scheme), param(7, 64, "none", name="v")
    leaves = pack_rows(scheme)(small, Local((stored(np.ones((7, 64))),)))
    layouts = {"w": f"{scheme}_rows", "v": "dense"}
    assert local_bytes([small], layouts) == sum(leaf.nbytes for leaf in leaves.values()) == 7 * 64 + 7 * 4
    assert local_bytes([small, plain], layouts) == 7 * 64 + 7 * 4 + 7 * 64 * 2
    assert quantized([small, plain], layouts) == [f"1 weights are quantized to {scheme}: 476 bytes, 896 bytes without"]
    assert quantized([plain], layouts) == []


def test_a_backend_without_packings_keeps_what_it_quantizes() -> None:
    assert local_bytes([param(7, 64, "int8", "float32")], {"w": ""}) == 7 * 64 * 4
