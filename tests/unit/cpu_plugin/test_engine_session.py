"""Sessions of the native engine: pages in both layouts, and what becomes of inputs that would lead C out of bounds."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tests.unit.cpu_plugin.engines import PANELS, SLOTS, Native, miniature

from lineshaft.plan import ProgramSpec
from lineshaft_conformance.harness.paged import Layout, Miniature, Row
from lineshaft_conformance.harness.rig import Rig
from lineshaft_contract.errors import ContractViolation, OutOfMemory, SessionClosed
from lineshaft_contract.ops.spec import HostArray, numpy_dtype
from lineshaft_contract.problems import KVProblem, PointwiseProblem, RopeProblem
from lineshaft_contract.steps import ArraySpec, HostStep, InputField, InputLayout, StepShape, forward_inputs
from lineshaft_cpu import native
from lineshaft_cpu.engine import caches, memory
from lineshaft_cpu.engine.session import NativeSession

COUNTS = (0, 1, 3, 5, 7)

# ---- pages -----------------------------------------------------------------------------------------------------------


STORED = (
    ("float32", "float32", "none"), ("bfloat16", "bfloat16", "none"), ("float32", "float8_e5m2", "tensor"),
    ("bfloat16", "int8", "token_head"),
)  # fmt: skip
"""What is executed, and what pages hold."""


@pytest.fixture(params=[(layout, *stored) for layout in caches.LAYOUTS for stored in STORED], ids="-".join)
def paged(request: pytest.FixtureRequest) -> Iterator[tuple[NativeSession, KVProblem]]:
    """A session with one cache of 9 pages."""
    layout, dtype, kv_dtype, scheme = request.param
    sizes = {"kv_heads": 3, "qk_dim": 32, "v_dim": 64, "page_size": 32}
    problem = KVProblem(dtype=dtype, kv_dtype=kv_dtype, kv_scheme=scheme, **sizes)
    session = NativeSession(native.load(), 2)
    session.alloc_caches([problem], [9], layout)
    yield session, problem
    session.close()


def random_pages(problem: KVProblem, count: int, seed: int = 0) -> dict[str, HostArray]:
    """Bits of all kinds, NaN among them."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (shape, dtype) in problem.page_arrays.items():
        kind = numpy_dtype(dtype)
        raw = rng.integers(0, 256, (count, *shape[:-1], shape[-1] * kind.itemsize), np.uint8)
        found[name] = raw.view(kind)
    return found


def same_bits(found: dict[str, HostArray], wanted: dict[str, HostArray], ids: Any = slice(None)) -> bool:
    return found.keys() == wanted.keys() and all(found[n].tobytes() == wanted[n][ids].tobytes() for n in wanted)


@pytest.mark.parametrize("count", COUNTS)
def test_pages_come_back_bit_by_bit(paged: tuple[NativeSession, KVProblem], count: int) -> None:
    session, problem = paged
    everything = random_pages(problem, 9, 1)
    session.write_pages(0, np.arange(9), everything).wait()
    ids = np.random.default_rng(count).permutation(9)[:count].astype(np.int32)
    written = random_pages(problem, count, 2)
    session.write_pages(0, ids, written).wait()
    assert same_bits(session.read_pages(0, ids), written)
    rest = np.setdiff1d(np.arange(9), ids)
    assert same_bits(session.read_pages(0, rest), everything, rest), "the other pages are as they were"


@pytest.mark.parametrize("count", COUNTS)
def test_copies_read_all_sources_before_they_write(paged: tuple[NativeSession, KVProblem], count: int) -> None:
    session, problem = paged
    everything = random_pages(problem, 9, 3)
    session.write_pages(0, np.arange(9), everything).wait()
    source = np.arange(1, 1 + count, dtype=np.int32)
    session.copy_pages(0, source, np.roll(source, 1)).wait()
    assert same_bits(session.read_pages(0, np.roll(source, 1)), everything, source)
    assert same_bits(session.read_pages(0, np.array([0, 8])), everything, np.array([0, 8]))


def test_what_is_read_is_a_copy(paged: tuple[NativeSession, KVProblem]) -> None:
    session, problem = paged
    session.write_pages(0, np.array([2]), random_pages(problem, 1)).wait()
    found = session.read_pages(0, np.array([2]))
    found["k"][...] = 0
    assert same_bits(session.read_pages(0, np.array([2])), random_pages(problem, 1))


BAD_IDS = [[9], [-1], [0, 3, 2**31 - 1], [-(2**31)]]


@pytest.mark.parametrize("ids", BAD_IDS)
def test_pages_that_are_not_there_are_refused(paged: tuple[NativeSession, KVProblem], ids: list[int]) -> None:
    session, problem = paged
    bad, good = np.array(ids, np.int32), np.zeros(len(ids), np.int32)
    before = session.read_pages(0, np.arange(9))
    for call in (
        lambda: session.read_pages(0, bad),
        lambda: session.write_pages(0, bad, random_pages(problem, len(ids))),
        lambda: session.copy_pages(0, bad, good),
        lambda: session.copy_pages(0, good, bad),
    ):
        with pytest.raises(ContractViolation, match=r"page ids of group 0 .* allowed are 0 to 8"):
            call()
    assert same_bits(session.read_pages(0, np.arange(9)), before)


def test_pages_of_another_form_are_refused(paged: tuple[NativeSession, KVProblem]) -> None:
    session, problem = paged
    right, ids = random_pages(problem, 2), np.array([1, 2])
    wrong: list[dict[str, HostArray]] = [
        {"k": right["k"]}, {**right, "v": right["v"][:1]}, {**right, "k": right["k"][:, :-1]},
        {**right, "v": np.zeros(right["v"].shape)},
    ]  # fmt: skip
    for pages in wrong:
        with pytest.raises(ContractViolation, match=r"write_pages is given .* as '[kv]'; it takes "):
            session.write_pages(0, ids, pages)
    with pytest.raises(ContractViolation, match="write_pages is given w; the cache has k, v"):
        session.write_pages(0, ids, {**right, "w": right["k"]})
    with pytest.raises(ContractViolation, match="copy_pages of 2 pages to 1"):
        session.copy_pages(0, ids, ids[:1])


def test_caches_and_groups_that_are_not_there_are_refused(paged: tuple[NativeSession, KVProblem]) -> None:
    session, _ = paged
    for cache in (-1, 1):
        with pytest.raises(ContractViolation, match=f"cache {cache}: 1 are allocated"):
            session.read_pages(cache, np.array([0]))
    with pytest.raises(ContractViolation, match="cache group 7: allocated are 0"):
        session.copy_pages(7, np.array([0]), np.array([1]))
    with pytest.raises(ContractViolation, match="are float64; integers are needed"):
        session.read_pages(0, np.array([0.5]))
    with pytest.raises(ContractViolation, match="holds 4294967296 to 4294967296"):
        session.read_pages(0, np.array([2**32]))
    assert len(session.read_pages(0, np.array([]))["k"]) == 0


def test_an_unknown_layout_is_refused() -> None:
    session = NativeSession(native.load(), 1)
    with pytest.raises(ContractViolation, match=f"'blocked' is not known .* {', '.join(caches.LAYOUTS)}"):
        session.alloc_caches([], [], "blocked")
    session.close()


# ---- inputs of a step ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[PANELS, SLOTS], ids=["panels", "slots"])
def stepped(request: pytest.FixtureRequest) -> Iterator[tuple[Miniature, Row]]:
    """A miniature with a row of 8 tokens, in its larger program (16 tokens, 4 rows)."""
    with miniature(2, request.param) as model:
        assert model.rig.planned.plan.cache_layout == (caches.PANELS if request.param is PANELS else caches.SLOTS)
        row = model.add()
        model.step((row, 8))
        yield model, row


@dataclass(frozen=True)
class Wrong:
    """An input, the index that is changed, and to what (given the layout)."""

    name: str
    at: Any
    value: Callable[[Layout], int]
    said: str


WRONG = {
    "page too high": Wrong("page_table.0", (0, 0), lambda at: at.pages, "page_table.0 holds"),
    "page negative": Wrong("page_table.0", (0, 1), lambda at: -1, "page_table.0 holds -1"),
    "page of a row that is not there": Wrong("page_table.0", (3, 0), lambda at: 2**31 - 1, "page_table.0 holds"),
    "slot too high": Wrong("slots.0", 1, lambda at: at.pages * at.page_size, "slots.0 holds"),
    "slot negative": Wrong("slots.0", 0, lambda at: -1, "slots.0 holds -1"),
    "starts beyond the tokens": Wrong("query_starts", slice(1, None), lambda at: 17, "at most 16"),
    "starts descend": Wrong("query_starts", 2, lambda at: 1, "query_starts .*ascend"),
    "starts negative": Wrong("query_starts", 0, lambda at: -3, "query_starts .*ascend"),
    "starts late": Wrong("query_starts", 0, lambda at: 1, "query_starts .*ascend from 0"),
    "starts huge": Wrong("query_starts", 4, lambda at: 2**31 - 1, "query_starts .*ascend"),
    "context beyond the pages": Wrong("context_lens.0", 0, lambda at: at.columns * at.page_size + 1, "context_lens.0"),
    "context negative": Wrong("context_lens.0", 0, lambda at: -1, "context_lens.0 holds -1"),
    "logits of no row": Wrong("logit_rows", 0, lambda at: 16, "logit_rows holds"),
    "logits negative": Wrong("logit_rows", 2, lambda at: -1, "logit_rows holds -1"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_an_index_out_of_range_is_refused_before_anything_runs(stepped: tuple[Miniature, Row], wrong: Wrong) -> None:
    model, row = stepped
    model.grow(row, 7)
    host = model.rig.host(model._inputs(model.shapes[1], [(row, 7)]), 1)
    before = model.rig.session.read_pages(0, np.arange(model.layout.pages))
    host[wrong.name][wrong.at] = wrong.value(model.layout)
    with pytest.raises(ContractViolation, match=wrong.said):
        model.rig.programs[1](host)
    after = model.rig.session.read_pages(0, np.arange(model.layout.pages))
    assert same_bits(after, before)
    model.step((row, 1))  # the session is as usable as before


def test_padding_tokens_may_have_any_slot(stepped: tuple[Miniature, Row]) -> None:
    model, row = stepped
    model.grow(row, 1)
    begun = model._inputs(model.shapes[1], [(row, 1)])
    begun["slots.0"][1:] = 2**31 - 1
    begun["positions"][1:] = -5
    model.rig.run(begun, 1)
    model.rig.session.read_pages(0, np.array([0]))


def test_references_do_not_write_padding_tokens_either() -> None:
    with miniature(2, SLOTS, "float64") as model:
        row = model.add()
        model.step((row, 3))
        assert model.rig.programs[1].report.details["host_calls"]
        model.grow(row, 1)
        begun = model._inputs(model.shapes[1], [(row, 1)])
        begun["slots.0"][1:] = 2**31 - 1
        model.rig.run(begun, 1)


def test_more_tokens_of_a_row_than_were_captured_are_refused() -> None:
    shape = StepShape(8, 2, (), 2, max_query=2)
    with Rig(Native(), [turning(shape)], uses=TURNS) as rig:
        values = {"query_starts": np.array([0, 2, 4], np.int32)}
        rig.run(values)
        values["query_starts"][1] = 1
        with pytest.raises(ContractViolation, match=r"a row of 3 tokens; .* captured for at most 2"):
            rig.run(values)


# ---- positions -------------------------------------------------------------------------------------------------------

MOST = 50
TURNS = {"rope": ("rope", RopeProblem(dtype="float32", head_dim=32, dim=32, base=1e4, max_position=MOST))}


def turning(shape: StepShape) -> ProgramSpec:
    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        q, k = ops.rope(step.arrays["q"], step.arrays["k"], step.positions)
        return {"q": q, "k": k}, caches

    heads = [InputField(name, "float32", (shape.tokens, 2, 32)) for name in "qk"]
    return ProgramSpec("turn", forward, shape, InputLayout([*forward_inputs(shape).fields, *heads]))


@pytest.mark.parametrize("position", [MOST, -1, 2**31 - 1])
def test_a_position_without_angles_is_refused(position: int) -> None:
    shape = StepShape(8, 2, (), 2, 8)
    with Rig(Native(), [turning(shape)], uses=TURNS) as rig:
        assert rig.kernels == ("cpu_rope",)
        values = {"query_starts": np.array([0, 2, 4], np.int32), "positions": np.zeros(8, np.int32)}
        values["positions"][3] = MOST - 1
        values["positions"][4:] = position  # of padding
        rig.run(values)
        values["positions"][3] = position
        with pytest.raises(ContractViolation, match=rf"positions holds .* allowed are 0 to {MOST - 1}"):
            rig.run(values)


# ---- handles ---------------------------------------------------------------------------------------------------------

ADD = {"add": ("add", PointwiseProblem(dtype="float32"))}
X = np.arange(24, dtype=np.float32).reshape(4, 6)


def adding(name: str, rows: int = 4, dtype: str = "float32") -> ProgramSpec:
    """x + y, where y is an array of another program's; a host output and the same as a handle."""
    shape = StepShape(rows, 1, (), 1, rows)

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        x = step.arrays["x"]
        return {"sum": ops.add(x, arrays.get("y", x))}, caches

    spec = ProgramSpec(name, forward, shape, InputLayout([InputField("x", dtype, (rows, 6))]))
    return spec if name == "double" else replace(spec, arrays={"y": ArraySpec((rows, 6), dtype)})


def test_handles_are_of_the_captured_form_and_of_the_latest_run() -> None:
    with Rig(Native(), [adding("double"), adding("sum"), adding("double", 3)], uses=ADD) as rig:
        doubled = rig.submit({"x": X}, 0).handle("sum")
        assert np.array_equal(rig.run({"x": X}, 1, {"y": doubled})["sum"], 3 * X)
        for arrays, said in (
            ({}, r"takes the arrays \['y'\]"),
            ({"z": doubled}, r"given \['z'\]"),
            ({"y": rig.submit({"x": X[:3]}, 2).handle("sum")}, "captured as"),
        ):
            with pytest.raises(ContractViolation, match=said):
                rig.submit({"x": X}, 1, arrays)
        with pytest.raises(ContractViolation, match="of the native engine is needed, not Foreign"):
            rig.submit({"x": X}, 1, {"y": Foreign(doubled.spec)})  # type: ignore[dict-item]
        rig.submit({"x": X}, 0)
        with pytest.raises(ContractViolation, match="handle 'sum' is stale"):
            rig.submit({"x": X}, 1, {"y": doubled})
        with pytest.raises(ContractViolation, match="no output 'sums'; it has sum"):
            rig.submit({"x": X}, 0).handle("sums")
        with pytest.raises(ContractViolation, match="inputs are 64 bytes, the program's 96"):
            rig.programs[0](HostStep(InputLayout([InputField("x", "float32", (16,))])))
        assert np.array_equal(rig.run({"x": X}, 0)["sum"], 2 * X)


def test_an_output_that_is_a_given_array_has_its_values() -> None:
    spec = adding("sum")

    def forward(ops: Any, weights: Any, caches: Any, step: Any, arrays: Any) -> Any:
        return {"same": arrays["y"], "some": arrays["y"].reshape(24)[6:12]}, caches

    with Rig(Native(), [adding("double"), replace(spec, fn=forward)], uses=ADD) as rig:
        doubled = rig.submit({"x": X}, 0).handle("sum")
        found = rig.run({"x": X}, 1, {"y": doubled})
        assert np.array_equal(found["same"], 2 * X)
        assert np.array_equal(found["some"], 2 * X[1])


@dataclass(frozen=True)
class Foreign:
    """A handle of another backend."""

    spec: ArraySpec


def test_a_program_does_not_outlive_its_weights_or_its_session() -> None:
    rig = Rig(Native(), [adding("double")], uses=ADD)
    rig.session.thaw()
    rig.session.load([], rig.checkpoint, {})
    with pytest.raises(ContractViolation, match="capture it again"):
        rig.run({"x": X})
    rig.session.close()
    with pytest.raises(SessionClosed):
        rig.run({"x": X})


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_system_without_huge_pages_gives_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 4711)
    found = memory.pages(100)
    assert found.nbytes >= 100 and not found.any()


def test_only_a_lack_of_memory_is_said_to_be_one() -> None:
    with pytest.raises(FileNotFoundError), memory.typed_memory("weights"):
        raise FileNotFoundError("a file")
    with pytest.raises(OutOfMemory, match="no memory for weights"), memory.typed_memory("weights"):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(RuntimeError, match="a bug"), memory.helpers(2):
        raise RuntimeError("a bug")
    with pytest.raises(OutOfMemory, match="no team of 2 threads"), memory.helpers(2):
        raise RuntimeError("can't start new thread")


def test_no_memory_is_an_error_with_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = KVProblem(dtype="float32", kv_dtype="float32", kv_heads=1, qk_dim=32, v_dim=32, page_size=32)
    session = NativeSession(native.load(), 1)
    with pytest.raises(OutOfMemory, match="the KV caches"):
        session.alloc_caches([huge], [10**14], "")
    session.close()

    def refuse(nbytes: int) -> HostArray:
        raise MemoryError(f"{nbytes} bytes")

    rig = Rig(Native(), [adding("double")], uses=ADD)
    rig.session.thaw()
    for module in ("memory", "session"):
        monkeypatch.setattr(f"lineshaft_cpu.engine.{module}.pages", refuse)
    rig.session.memory = memory.Region()  # type: ignore[attr-defined]
    with pytest.raises(OutOfMemory, match=r"the results of a step of 9 tokens \(\d+ bytes\)"):
        rig.capture_more(adding("double", 9))
    monkeypatch.undo()
    assert np.array_equal(rig.run({"x": X})["sum"], 2 * X), "what was captured still runs"
    rig.session.close()
