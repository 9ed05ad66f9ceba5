"""Sessions: loading, updating, caches, pages, and the states that forbid calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from lineshaft.errors import ContractViolation, MisshapenTensor, OutOfMemory, SessionClosed, SessionFrozen
from lineshaft_contract.backends import World
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.problems import ConstProblem, LinearProblem
from lineshaft_contract.reference.session import ReferenceSession
from lineshaft_contract.sessions import Packing
from lineshaft_contract.steps import InputField, InputLayout, StepShape
from lineshaft_contract.weights import Local, Param, Stored
from lineshaft_torch.collectives import coordinate_of, members_of
from lineshaft_torch.session import TorchSession

SHAPE = StepShape(1, 1, (), 1, 1)
INPUTS = InputLayout([InputField("x", "float32", (2, 8))])


def test_weights_keep_their_values_keys_and_tree(kit) -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.ones((1, 3))
    loaded = kit.session().load({"a": kit.param("a", a), "list": [kit.param("b", b)]}, None, {})
    assert (loaded["a"].key, loaded["list"][0].key, loaded["a"].name) == (0, 1, "a")
    assert loaded["a"].arrays["data"].tolist() == a.tolist()
    assert loaded["a"].arrays["data"].dtype == torch.float32


def test_parts_are_joined_along_dim_0_and_dequantized(kit) -> None:
    plain = np.asarray([[1.0] * 32], ml_dtypes.bfloat16)
    blocks = np.zeros((1, 34), np.uint8)
    blocks[0, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    blocks[0, 2:] = 4
    parts = (Stored("none", (1, 32), {"data": plain}), Stored("q8_0", (1, 32), {"data": blocks}))
    problem = LinearProblem(dtype="float32", n=2, k=32)
    param = Param("w", "w", (2, 32), "float32", {"linear": problem}, lambda checkpoint, at: Local(parts))
    data = kit.session().load(param, None, {}).arrays["data"]
    assert data.tolist() == [[1.0] * 32, [2.0] * 32]


@pytest.mark.parametrize("pack", [None, lambda param, local: {"own": local.parts[0].arrays["data"]}])
def test_parts_that_do_not_make_up_the_shape_are_refused(kit, pack) -> None:
    stored = Stored("none", (2, 3), {"data": np.zeros((2, 3), np.float32)})
    problem = LinearProblem(dtype="float32", n=3, k=3)
    param = Param("w", "w", (3, 3), "float32", {"linear": problem}, lambda checkpoint, at: Local((stored,)))
    with pytest.raises(MisshapenTensor, match=r"weight w: .*\[2, 3\].*\[3, 3\]"):
        kit.session().load(param, None, {"w": Packing("own", pack)})


def test_tied_params_share_memory_and_a_const_is_a_bare_tensor(kit) -> None:
    a = np.ones((2, 3))
    const = Param(
        "start", "start", (1,), "int32", {"const": ConstProblem(dtype="int32", shape=(1,))},
        lambda checkpoint, at: Local((Stored("none", (1,), {"data": np.asarray([at.tp * 4], np.int32)}),)),
    )  # fmt: skip
    session = kit.session()
    tree = {"embed": kit.param("e", a, source="e"), "head": kit.param("h", a, source="e"), "start": const}
    loaded = session.load(tree, None, {})
    assert loaded["embed"].arrays["data"].data_ptr() == loaded["head"].arrays["data"].data_ptr()
    assert loaded["embed"].key != loaded["head"].key
    assert loaded["start"].tolist() == [0] and loaded["start"].dtype == torch.int32


def test_a_kernels_packing_is_used_and_named(kit) -> None:
    def pack(param: Param, local: Local) -> dict[str, np.ndarray]:
        return {"t": np.ascontiguousarray(local.parts[0].arrays["data"].T)}

    loaded = kit.session().load(kit.param("a", np.ones((2, 3), np.float32)), None, {"a": Packing("turned", pack)})
    assert loaded.layout == "turned" and loaded.arrays["t"].shape == (3, 2)


def test_update_replaces_values_in_place_or_changes_nothing(kit) -> None:
    session = kit.session()
    loaded = session.load([kit.param("a", np.ones((2, 3))), kit.param("b", np.ones((2, 3)))], None, {})
    where = loaded[0].arrays["data"].data_ptr()
    session.update({"a": np.full((2, 3), 7.0, np.float32)})
    assert loaded[0].arrays["data"].tolist() == [[7.0] * 3] * 2 and loaded[0].arrays["data"].data_ptr() == where
    with pytest.raises(MisshapenTensor, match=r"'b': shape \[3, 2\]"):
        session.update({"a": np.zeros((2, 3)), "b": np.zeros((3, 2))})
    assert loaded[0].arrays["data"].tolist() == [[7.0] * 3] * 2
    with pytest.raises(MisshapenTensor, match="'c'"):
        session.update({"c": np.zeros(1)})


@pytest.mark.parametrize("make", [TorchSession, ReferenceSession])
def test_an_update_of_one_tied_param_reaches_the_other_in_every_session(kit, make: Callable[[], Any]) -> None:
    session = make()
    wide, narrow = kit.param("w", np.ones((2, 3)), source="s"), kit.param("n", np.ones((2, 3)), source="s")
    other = kit.param("o", np.ones((2, 3)))
    loaded = session.load([wide, replace(narrow, dtype="float64"), replace(wide, name="w2"), other], None, {})

    def held() -> list[float]:
        return [float(weight.arrays["data"].max()) for weight in loaded]

    assert loaded[0].arrays["data"] is loaded[2].arrays["data"]
    session.update({"n": np.full((2, 3), 7.0, np.float32)})
    assert held() == [7, 7, 7, 1]
    session.update({"w": np.full((2, 3), 3.0, np.float32), "n": np.full((2, 3), 4.0, np.float32)})
    assert held() == [4, 4, 4, 1]
    for bad in ({"o": np.zeros((3, 2))}, {"unknown": np.zeros(1)}):
        with pytest.raises(MisshapenTensor, match=next(iter(bad))):
            session.update({"w": np.zeros((2, 3)), **bad})
    assert held() == [4, 4, 4, 1]


def test_pages_make_a_round_trip_between_sessions_in_canonical_form(kit) -> None:
    rng = np.random.default_rng(1)
    one, two = kit.session(), kit.session()
    for session in (one, two):
        session.alloc_caches([kit.kv(kv_dtype="bfloat16"), kit.kv(v_dim=0)], [6], "slots")
    ids = np.asarray([5, 2], np.int32)
    sent = {
        0: {name: rng.standard_normal((2, 4, 2, 4)).astype(ml_dtypes.bfloat16) for name in "kv"},
        1: {"k": rng.standard_normal((2, 4, 2, 4)).astype(np.float32)},
    }
    for cache, pages in sent.items():
        assert one.write_pages(cache, ids, pages).done()
        read = one.read_pages(cache, ids)
        two.write_pages(cache, ids, read).wait()
        for name, array in two.read_pages(cache, ids).items():
            assert array.dtype == pages[name].dtype and array.tobytes() == pages[name].tobytes()
        assert not np.any(one.read_pages(cache, np.asarray([1, 3, 4]))["k"].astype(np.float32))


@pytest.mark.parametrize(
    "stored",
    [
        *({"kv_dtype": name} for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")),
        {"kv_dtype": "int8", "kv_scheme": "token_head"},
        {"kv_dtype": "int8", "kv_scheme": "block", "qk_dim": 64, "v_dim": 32},
    ],
    ids=lambda stored: "-".join(map(str, stored.values())),
)
def test_narrow_pages_are_moved_bit_for_bit_with_their_scales(kit, stored: dict[str, Any]) -> None:
    problem, rng = kit.kv(**stored), np.random.default_rng(2)
    session = kit.session()
    session.alloc_caches([problem], [4], "slots")
    sent = {
        name: rng.integers(1, 100, (2, *shape)).astype(numpy_dtype(dtype))
        for name, (shape, dtype) in problem.page_arrays.items()
    }
    session.write_pages(0, np.array([1, 3]), sent)
    session.copy_pages(0, np.array([3]), np.array([2]))
    read = session.read_pages(0, np.array([1, 2]))
    assert list(read) == list(sent)
    assert all(read[name].tobytes() == array.tobytes() for name, array in sent.items())
    assert sum(array[:1].nbytes for array in sent.values()) == problem.page_bytes


def test_copy_pages_copies_every_cache_of_its_group_only(kit) -> None:
    session = kit.session()
    session.alloc_caches([kit.kv(), kit.kv(group=1), kit.kv()], [4, 4], "slots")
    for cache in range(3):
        session.write_pages(
            cache, np.asarray([1]), {name: np.full((1, 4, 2, 4), 1.0 + cache, np.float32) for name in "kv"}
        )
    session.copy_pages(0, np.asarray([1, 0], np.int32), np.asarray([3, 0], np.int32))
    found = [session.read_pages(cache, np.asarray([3]))["v"].max() for cache in range(3)]
    assert found == [1.0, 0.0, 3.0]


def test_caches_that_do_not_fit_are_an_out_of_memory_on_one_line(kit) -> None:
    with pytest.raises(OutOfMemory, match="KV caches") as caught:
        kit.session().alloc_caches([kit.kv()], [10**13], "slots")
    assert "\n" not in str(caught.value)


def test_a_step_that_does_not_fit_is_an_out_of_memory_and_another_failure_is_itself(kit) -> None:
    def allocate(*_: object) -> None:
        torch.empty(10**15)

    def overlap(*_: object) -> None:
        torch.zeros(1).expand(4).add_(1)

    with pytest.raises(OutOfMemory, match="results of a step of 1 tokens"):
        kit.session().capture(allocate, SHAPE, INPUTS, kit.HandPlanned({}))
    with pytest.raises(RuntimeError, match="single memory location"):
        kit.session().capture(overlap, SHAPE, INPUTS, kit.HandPlanned({}))


def test_an_unknown_cache_layout_is_refused(kit) -> None:
    with pytest.raises(ContractViolation, match="'rows'"):
        kit.session().alloc_caches([kit.kv()], [4], "rows")


def test_freeze_forbids_what_traces_until_thaw(kit) -> None:
    session = kit.session()
    session.freeze()
    for call in (
        lambda: session.load({}, None, {}),
        lambda: session.alloc_caches([], [], "slots"),
        lambda: session.capture(lambda *_: ({}, []), SHAPE, INPUTS, kit.HandPlanned({})),
    ):
        with pytest.raises(SessionFrozen, match="thaw"):
            call()
    session.thaw()
    session.alloc_caches([kit.kv()], [2], "slots")


def test_after_close_every_call_raises_and_close_is_idempotent(kit) -> None:
    session = kit.session()
    session.alloc_caches([kit.kv()], [2], "slots")
    session.close()
    session.close()
    for call in (
        session.freeze,
        session.thaw,
        lambda: session.load({}, None, {}),
        lambda: session.update({}),
        lambda: session.alloc_caches([], [], "slots"),
        lambda: session.read_pages(0, np.zeros(1)),
        lambda: session.write_pages(0, np.zeros(1), {}),
        lambda: session.copy_pages(0, np.zeros(1), np.zeros(1)),
        lambda: session.capture(lambda *_: ({}, []), SHAPE, INPUTS, kit.HandPlanned({})),
    ):
        with pytest.raises(SessionClosed):
            call()


def test_ranks_are_row_major_over_the_mesh() -> None:
    axes = (("dp", 2), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", 3))
    worlds = [World(rank, axes) for rank in range(6)]
    places = [(coordinate_of(world).dp, coordinate_of(world).tp) for world in worlds]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert members_of(worlds[4], ["tp"]) == [3, 4, 5]
    assert members_of(worlds[4], ["dp"]) == [1, 4]
    assert members_of(worlds[4], ["dp", "tp"]) == [0, 1, 2, 3, 4, 5]
    assert members_of(worlds[4], ["tp", "dp"]) == [0, 3, 1, 4, 2, 5]
