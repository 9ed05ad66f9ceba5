"""Sessions of the JAX kit beyond what conformance asks: kept programs, pages in bulk, programs that are out of date."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lineshaft.errors import ContractViolation, InvalidValue
from lineshaft.plan import ProgramSpec
from lineshaft_conformance.harness.rig import Rig, const_param
from lineshaft_conformance.subject import Subject, Target
from lineshaft_contract.backends import World
from lineshaft_contract.ops.spec import numpy_dtype
from lineshaft_contract.problems import KVProblem
from lineshaft_contract.steps import ArraySpec, InputField, InputLayout, StepInputs, StepShape
from lineshaft_jax.devices import cpu_devices
from lineshaft_jax.kernels.pages import cache_specs
from lineshaft_jax.mesh import Placement, mesh_of
from lineshaft_jax.program import DeviceArray, InFlight
from lineshaft_jax.session import JaxSession, SessionOptions
from lineshaft_jax.store import CHECKSUM, ProgramStore, checksum, find_store, open_store
from lineshaft_jax.transfers import FEW, MANY, PageMover, chunks

SHAPE = StepShape(tokens=1, rows=1, pages=(), logits=1, max_query=1)
X = np.arange(4, dtype=np.float32).reshape(1, 4)
Y = np.ones((1, 4), np.float32)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    made = Subject(Target("tpu", {"platform": "cpu", "cache_dir": "off"}))
    yield made
    made.close()


def forward(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
    return {"sum": ops.add(step.arrays["x"], weights["y"])}, caches


def session(store: ProgramStore | None = None) -> JaxSession:
    return JaxSession(World(), jax.devices("cpu"), SessionOptions(store=store))


def started(subject: Subject, held: JaxSession) -> Rig:
    """A session with one program, x + y."""
    spec = ProgramSpec("sum", forward, SHAPE, InputLayout([InputField("x", "float32", X.shape)]))
    return Rig(subject, [spec], params={"y": const_param("y", Y)}, values={"y": Y}, session=held)


def compiled(subject: Subject, store: ProgramStore) -> int:
    """How many programs a start over the store compiles; what it runs must be right."""
    with started(subject, session(store)) as rig:
        (program,) = rig.programs
        assert program.report.cached == (rig.session.compiled == 0)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(rig.run({"x": X})["sum"], X + Y)
        return int(rig.session.compiled)  # type: ignore[attr-defined]


# ---- the store of compiled programs ------------------------------------------------------------------------------


def test_a_second_start_compiles_nothing_unless_versions_differ(subject: Subject, tmp_path: Path) -> None:
    store = open_store(tmp_path / "programs", {"jax": "1"})
    assert [compiled(subject, store) for _ in range(2)] == [1, 0]
    other = open_store(tmp_path / "programs", {"jax": "2"})
    assert [compiled(subject, other), compiled(subject, store)] == [1, 0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign"])
def test_a_damaged_program_is_compiled_anew(
    subject: Subject, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path / "programs", {})
    compiled(subject, store)
    (path,) = store.folder.iterdir()
    content = bytearray(path.read_bytes())
    content[CHECKSUM + 7] ^= 1
    foreign = b"no program"
    path.write_bytes({
        "flipped": bytes(content), "cut": bytes(content[:100]), "empty": b"",
        "foreign": checksum(path.name, foreign) + foreign,
    }[damage])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert compiled(subject, store) == 1
    assert str(path) in caplog.text and "compiled anew" in caplog.text
    assert compiled(subject, store) == 0


def test_a_folder_that_is_gone_costs_a_warning(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path / "programs", {})
    store.folder.rmdir()
    with caplog.at_level(logging.WARNING):
        assert compiled(subject, store) == 1
    assert "not kept" in caplog.text


def test_weights_that_share_an_array_make_another_program(subject: Subject, tmp_path: Path) -> None:
    """Three of one shape, of which two are one: neither shapes nor calls tell which two."""
    store = open_store(tmp_path / "programs", {})

    def sums(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
        return {name: ops.add(step.arrays["x"], value) for name, value in weights.items()}, caches

    def found(**sources: str) -> dict[str, float]:
        values = {name: Y * ord(source) for name, source in sources.items()}
        params = {name: replace(const_param(name, Y), source_id=source) for name, source in sources.items()}
        spec = ProgramSpec("sums", sums, SHAPE, InputLayout([InputField("x", "float32", X.shape)]))
        with Rig(subject, [spec], params=params, values=values, session=session(store)) as rig:
            return {name: float(value[0, 0]) for name, value in rig.run({"x": X}).items()}

    for sources in ({"a": "p", "b": "p", "c": "q"}, {"a": "p", "b": "q", "c": "q"}):
        assert found(**sources) == {name: ord(source) for name, source in sources.items()}


def test_a_folder_that_others_may_write_to_or_that_is_a_file_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(InvalidValue, match="others may write"):
        open_store(shared, {})
    (tmp_path / "file").touch()
    with pytest.raises(InvalidValue, match="cannot be used"):
        open_store(tmp_path / "file", {})


def test_the_programs_used_longest_ago_go_first(tmp_path: Path) -> None:
    store = ProgramStore(tmp_path, {}, most=20)
    new, old, older = (store.key([name]) for name in ("new", "old", "older"))
    for age, name in enumerate((new, old, older)):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    store.prune()
    assert {path.name for path in tmp_path.iterdir()} == {new, old}


def test_files_that_the_store_has_not_written_stay(tmp_path: Path) -> None:
    store = ProgramStore(tmp_path, {}, most=0)
    key = store.key([])
    (tmp_path / key).mkdir()  # of a program's name, and not the store's all the same
    foreign = ["model.safetensors", ".hidden", f"{key}.bak", key[:-1]]
    for name in foreign:
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000, 1000))
    store.prune()
    assert {path.name for path in tmp_path.iterdir()} == {key, *foreign}


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    store = ProgramStore(tmp_path, {})
    left, writing = (tmp_path / f".{store.key([])}.{pid}" for pid in (1, 2))
    left.write_bytes(b"x")
    os.utime(left, (1000, 1000))
    writing.write_bytes(b"x")
    store.prune()
    assert list(tmp_path.iterdir()) == [writing]


def test_a_program_under_the_name_of_another_is_compiled_anew(subject: Subject, tmp_path: Path) -> None:
    first, second = (open_store(tmp_path / "programs", {"jax": version}) for version in "12")
    compiled(subject, first)
    (one,) = first.folder.iterdir()
    compiled(subject, second)
    (two,) = {*first.folder.iterdir()} - {one}
    two.write_bytes(one.read_bytes())
    assert [compiled(subject, first), compiled(subject, second)] == [0, 1]


def test_a_folder_in_the_place_of_a_program_costs_a_warning(
    subject: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path / "programs", {})
    compiled(subject, store)
    (path,) = store.folder.iterdir()
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert compiled(subject, store) == 1
    assert f"{path} cannot be read" in caplog.text and "not kept" in caplog.text
    assert list(store.folder.iterdir()) == [path]


@pytest.mark.parametrize("name", ["~no-such-user/programs", "nul\0byte"])
def test_a_folder_that_cannot_be_named_is_refused(name: str) -> None:
    with pytest.raises(InvalidValue, match="cache_dir"):
        find_store(name, jax.devices("cpu"), ())


# ---- programs ----------------------------------------------------------------------------------------------------


def test_a_program_of_weights_that_were_loaded_over_is_refused(subject: Subject) -> None:
    with started(subject, session()) as rig:
        (stale,) = rig.programs
        rig.session.thaw()
        rig.reload({"y": rig.checkpoint.rows("y", 0, 1)})
        with pytest.raises(ContractViolation, match="capture it again"):
            stale(rig.host({"x": X}))
        np.testing.assert_array_equal(rig.run({"x": X})["sum"], X + Y)


def test_a_handle_of_other_devices_is_refused_and_harms_nothing(subject: Subject) -> None:
    def doubled(ops: Any, weights: Any, caches: Any, step: StepInputs, arrays: Any) -> Any:
        return {"doubled": ops.add(arrays["held"], arrays["held"])}, caches

    held = ArraySpec((1, 4), "float32")
    spec = ProgramSpec("doubled", doubled, SHAPE, InputLayout([]), {"held": held})
    elsewhere = JaxSession(World(), jax.devices("cpu")[1:], SessionOptions())
    with started(subject, session()) as rig, Rig(subject, [spec], session=elsewhere) as other:
        foreign = rig.submit({"x": X}).handle("sum")
        with pytest.raises(ContractViolation, match="other devices"):
            other.submit({}, 0, {"held": foreign})
        own = DeviceArray(elsewhere.placement.zeros((1, 4), np.float32), 1)
        np.testing.assert_array_equal(other.submit({}, 0, {"held": own}).result("doubled"), 0 * X)


def test_waiting_covers_steps_whose_outputs_nobody_holds() -> None:
    @jax.jit
    def long(x: Any) -> Any:
        return jax.lax.fori_loop(0, 60, lambda _, y: y @ y / 300, x)

    x, flight = np.ones((300, 300), np.float32), InFlight()
    long(x).block_until_ready()
    slow = long(x)
    flight.add({"slow": slow, "larger": np.ones((900, 900))})
    flight.add({})
    flight.wait()
    assert slow.is_ready()


# ---- pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lanes", [1, 128])
@pytest.mark.parametrize(
    ("dtype", "scheme"), [("bfloat16", "none"), ("float8_e4m3fn", "none"), ("int8", "token_head"), ("float32", "none")]
)
def test_pages_come_back_as_they_were_written(ranks: int, lanes: int, dtype: str, scheme: str) -> None:
    problem = KVProblem(
        dtype="float32", kv_heads=2, qk_dim=4, v_dim=3, page_size=2, kv_dtype=dtype, kv_scheme=scheme
    )  # fmt: skip
    pages, rng = MANY + 90, np.random.default_rng(5)
    world = World(axes=(("dp", 1), ("pp", 1), ("cp", 1), ("ep", 1), ("tp", ranks)), ranks=ranks)
    placement = Placement(mesh_of(world, jax.devices("cpu")))
    specs = cache_specs(problem, pages, lanes)
    held: Mapping[str, Any] = {n: placement.zeros(shape, numpy_dtype(d)) for n, (shape, d) in specs.items()}
    mover = PageMover(placement, problem, pages)

    def drawn(count: int) -> dict[str, Any]:
        shapes = {n: ((count, s[0], s[1] * ranks, *s[2:]), d) for n, (s, d) in problem.page_arrays.items()}
        return {n: rng.integers(-8, 9, shape).astype(numpy_dtype(d)) for n, (shape, d) in shapes.items()}

    ids = rng.permutation(np.arange(1, pages)).astype(np.int32)  # in bulk, some more, and a rest that is padded
    shadow = {name: np.zeros((pages, *values.shape[1:]), values.dtype) for name, values in drawn(1).items()}
    new = drawn(len(ids))
    held = mover.write(held, ids, new)
    held = mover.copy(mover.warm(held), ids[:3], ids[[1, 0, 5]])
    for name, values in shadow.items():
        values[ids] = new[name]
        values[ids[[1, 0, 5]]] = values[ids[:3]]
    for wanted in (np.arange(pages, dtype=np.int32), ids[:3], ids[:0]):
        found = mover.read(held, wanted)
        assert found.keys() == shadow.keys()
        for name, values in found.items():
            assert values.dtype == shadow[name].dtype and values.tobytes() == shadow[name][wanted].tobytes(), name


def test_moves_are_of_two_sizes_and_small_pools_need_but_one() -> None:
    ids = np.arange(MANY + FEW + 1, dtype=np.int32)
    assert [len(part) for (part,) in chunks(MANY, ids)] == [MANY, FEW, FEW]
    assert {len(part) for (part,) in chunks(MANY - 1, ids)} == {FEW}
    (*_, (last,)) = chunks(MANY, ids)
    assert last.tolist() == [MANY + FEW] * FEW


@pytest.mark.parametrize("mode", ["jax_enable_x64", "jax_disable_jit"])
def test_a_mode_of_jax_that_changes_programs_is_refused_by_name(mode: str) -> None:
    before = getattr(jax.config, mode)
    try:
        jax.config.update(mode, True)
        with pytest.raises(InvalidValue, match=f"unset {mode.upper()}"):
            cpu_devices(1)
    finally:
        jax.config.update(mode, before)
