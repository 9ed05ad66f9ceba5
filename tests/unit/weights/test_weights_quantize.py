"""The packings of quantized weights: any parts, stored in any way, give the codes of the whole; and what they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as quantize_blocks

from lineshaft.errors import ContractViolation, MisshapenTensor
from lineshaft.weights.memory import local_bytes, quantized
from lineshaft_contract.ops.quantize import (
    ACTIVATION_SCHEMES,
    pack_nibbles,
    quantize_groups,
    quantize_rows,
    unpack_nibbles,
)
from lineshaft_contract.packing import pack_fnuz_rows, pack_groups, pack_rows
from lineshaft_contract.problems import LinearProblem
from lineshaft_contract.schemes import dequantize
from lineshaft_contract.weights import Local, Param, Stored

SCHEMES = ("int8", "fp8")


def param(n: int, k: int, scheme: str, dtype: str = "bfloat16", name: str = "w", group_size: int = 0) -> Param:
    problem = LinearProblem(dtype=dtype, n=n, k=k, scheme=scheme, group_size=group_size)
    return Param(name, name, (n, k), dtype, {"linear": problem}, lambda checkpoint, at: Local(()))


def stored(array: Any) -> Stored:
    return Stored("none", array.shape, {"data": array})


def blocks(array: Any, kind: str = "Q8_0") -> Stored:
    return Stored(kind.lower(), array.shape, {"data": quantize_blocks(array, GGMLQuantizationType[kind])})


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
    with pytest.raises(ContractViolation, match="weight w: codes in groups need a linear problem with a group_size"):
        pack_groups(param(7, 64, "int8"), Local((stored(np.ones((7, 64))),)))


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


def test_weights_whose_activations_are_quantized_too_are_packed_as_without() -> None:
    w = stored(np.random.default_rng(0).standard_normal((7, 64)))
    for scheme, rule in ACTIVATION_SCHEMES.items():
        one, other = (pack_rows(name)(param(7, 64, name), Local((w,))) for name in (scheme, rule))
        assert {name: leaf.tobytes() for name, leaf in one.items()} == {n: leaf.tobytes() for n, leaf in other.items()}
        assert local_bytes([param(7, 64, scheme)], {"w": f"{rule}_rows"}) == 7 * 64 + 7 * 4


@pytest.mark.parametrize("size", [32, 64])
def test_parts_are_quantized_by_groups(size: int) -> None:
    w = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    own = param(7, 64, "int4", group_size=size)
    made = pack_groups(own, Local((stored(w[:2]), blocks(w[2:6]), stored(w[6:].astype("f8")))))
    whole = np.concatenate([w[:2], dequantize(blocks(w[2:6]), "float32"), w[6:]])
    q, scale = quantize_groups(dequantize(stored(whole), "bfloat16"), size)
    assert made["q"].dtype == np.uint8 and made["q"].tobytes() == pack_nibbles(q).tobytes()
    assert made["scale"].dtype == np.float32 and made["scale"].tobytes() == scale.tobytes()
    nbytes = sum(leaf.nbytes for leaf in made.values())
    assert local_bytes([own], {"w": "int4_rows"}) == nbytes == 7 * 32 + 7 * 64 // size * 4
    assert quantized([own], {"w": "int4_rows"})[0].startswith(f"1 weights are quantized to int4: {nbytes} bytes, 896 ")


def test_a_share_of_whole_groups_has_the_codes_of_the_whole() -> None:
    """So a matrix that ranks cut along its columns is the same matrix at every degree."""
    w = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    whole = pack_groups(param(5, 128, "int4", group_size=32), Local((stored(w),)))
    for rank in range(2):
        columns = w[:, 64 * rank : 64 * (rank + 1)]
        share = pack_groups(param(5, 64, "int4", group_size=32), Local((stored(columns),)))
        np.testing.assert_array_equal(share["q"], whole["q"][:, 32 * rank : 32 * (rank + 1)])
        np.testing.assert_array_equal(share["scale"], whole["scale"][:, 2 * rank : 2 * (rank + 1)])


def test_a_file_in_blocks_of_the_same_rule_loses_nothing() -> None:
    """GGUF's Q4_0 has the codes and, rounded to float16, the scales of groups of 32."""
    file = blocks(np.random.default_rng(0).standard_normal((7, 256)).astype(np.float32), "Q4_0")
    made = pack_groups(param(7, 256, "int4", dtype="float32", group_size=32), Local((file,)))
    restored = unpack_nibbles(made["q"]).astype(np.float32) * made["scale"].repeat(32, 1)
    np.testing.assert_array_equal(restored, dequantize(file, "float32"))


def test_the_fnuz_packing_stands_for_the_same_products() -> None:
    own, local = param(7, 64, "fp8"), Local((stored(np.random.default_rng(0).standard_normal((7, 64))),))
    here, there = pack_rows("fp8")(own, local), pack_fnuz_rows(own, local)
    assert there["q"].dtype.name == "float8_e4m3fnuz"
    restored = (leaf["q"].astype(float) * leaf["scale"].astype(float)[:, None] for leaf in (here, there))
    np.testing.assert_array_equal(*restored)
