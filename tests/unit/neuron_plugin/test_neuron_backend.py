"""The backend: what it says of itself, which lane its sessions get, the room for their programs, and its options."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.neuron_plugin.fake_neuronx import forget, write_package
from tests.unit.neuron_plugin.static_sessions import (
    WIDTH,
    Planned,
    capture,
    const,
    giving,
    kv,
    started,
    step,
    writing,
)
from tests.unit.neuron_plugin.test_neuron_starting import OURS

from lineshaft.config.options import validate_options
from lineshaft.errors import BackendUnavailable, InvalidValue, LayoutError, OutOfMemory, UnknownKey
from lineshaft_contract.backends import World
from lineshaft_contract.sessions import UncountedMemory
from lineshaft_contract.steps import HostStep, InputField, InputLayout, StepShape
from lineshaft_neuron import stand_in, starting
from lineshaft_neuron.backend import NeuronBackend, create
from lineshaft_neuron.compile_lane import CompileLane
from lineshaft_neuron.memory import CoreMemory, Room
from lineshaft_neuron.options import NeuronOptions
from lineshaft_neuron.plugin import lineshaft_backends
from lineshaft_neuron.trace_lane import TraceLane

ONE = World()
SHAPE = StepShape(128, 2, (), 1, 128)
DOUBLE = giving(lambda x, arrays, weights: {"y": x * 2})


def world(**degrees: int) -> World:
    return World(axes=tuple((axis, degrees.get(axis, 1)) for axis in ("dp", "pp", "cp", "ep", "tp")))


# ---- on the stand-in -------------------------------------------------------------------------------------------------


def test_capabilities_follow_the_tables_of_the_options() -> None:
    options = NeuronOptions(stand_in=True, prefill_buckets=(8, 24), decode_buckets=(1, 3))
    found = create(options, World()).capabilities
    assert (found.token_buckets, found.row_buckets, found.max_query) == ((8, 24), (1, 3), 24)
    assert found.max_prefill_rows == 1 and not found.mixed_steps and found.fixed_kv_size and found.collectives
    usual = create(NeuronOptions(stand_in=True), World()).capabilities
    assert usual.max_query == usual.token_buckets[-1] == 4096  # type: ignore[index]


def test_the_stand_in_needs_no_package_and_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    before = dict(os.environ)
    backend = create(NeuronOptions(stand_in=True), World())
    assert dict(os.environ) == before
    (note,) = backend.capabilities.notes
    assert note.startswith("lane compile: stand_in = true") and "imitates" in note
    session = backend.session(0)
    assert isinstance(session.lane, CompileLane) and session.device == stand_in.start()
    session.close()


def test_each_session_has_its_rank_and_a_lane_of_its_own() -> None:
    backend = create(NeuronOptions(stand_in=True), world(tp=2))
    one, other = backend.session(0), backend.session(1)
    assert (one.world.rank, other.world.rank) == (0, 1) and one.lane is not other.lane
    one.close()
    assert capture(other, DOUBLE)(step(1)).result("y").shape == (4, WIDTH)
    other.close()


def test_kernels_have_one_name_each_and_the_plugin_replaces_whole_ops() -> None:
    kernels = create(NeuronOptions(stand_in=True), World()).kernels()
    names = [kernel.name for kernel in kernels]
    assert len(set(names)) == len(names) and {kernel.backend for kernel in kernels} == {"neuron"}
    own = {kernel.op for kernel in kernels if kernel.name.startswith("neuron_")}
    assert "attend" in own and "linear" not in own and "linear" in {kernel.op for kernel in kernels}
    assert all(kernel.name.startswith("neuron_") for kernel in kernels if kernel.op in own)


def test_without_a_device_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    with pytest.raises(BackendUnavailable, match="torch-neuronx is not installed; install torch-neuronx from"):
        create(NeuronOptions(), World())


# ---- with the package ------------------------------------------------------------------------------------------------

PACKAGE = """
from tests.unit.neuron_plugin.fake_neuronx import FakeNeuronx

fake = FakeNeuronx()
vars().update(vars(fake.module()))
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NeuronBackend]:
    """A backend over a fake torch_neuronx of a version, whose core is a device of torch."""

    def make(version: str, device: Callable[[], torch.device], place: World = ONE, **options: Any) -> NeuronBackend:
        forget(monkeypatch)
        for name in OURS:
            monkeypatch.setenv(name, "")  # so that what a start sets is undone
            monkeypatch.delenv(name)
        write_package(tmp_path / "site", version=version, source=PACKAGE)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setattr("lineshaft_neuron.probe.version_of", lambda name: version)
        monkeypatch.setattr(starting, "first_use", device)
        return create(NeuronOptions(cache_dir=str(tmp_path / "cache"), **options), place)

    return make


def test_before_2_10_the_lane_is_trace_and_a_session_runs_on_it(installed: Any, tmp_path: Path) -> None:
    backend = installed("2.9.0.2.15", lambda: torch.device("cpu"), compiler_flags="--optlevel 1")
    lane, cores, programs = backend.capabilities.notes
    assert lane.startswith("lane trace") and "2.9.0.2.15" in lane
    assert cores == "cores: NEURON_RT_NUM_CORES=1" and programs.startswith("compiled programs: ")
    assert isinstance(backend.memory, CoreMemory) and backend.shared.own_dtype
    session = backend.session(0)
    assert isinstance(session.lane, TraceLane)
    session.load({"w": const("w", np.full(WIDTH, 3, np.float32))}, None, {})
    session.alloc_caches([kv(), kv(kv_dtype="bfloat16")], [4], "slots")
    double = capture(session, giving(lambda x, arrays, weights: {"y": x * weights["w"]}))
    write = capture(session, writing)
    session.freeze()
    assert np.array_equal(double(step(1)).result("y"), step(1)["x"] * 3)
    session.update({"w": np.full(WIDTH, -1, np.float32)})
    assert np.array_equal(double(step(1)).result("y"), -step(1)["x"])
    write(step(2, rows=[4, 5, 6, 7]))
    session.copy_pages(0, np.array([1]), np.array([3]))
    found = session.read_pages(0, np.array([3, 2]))
    assert np.array_equal(found["k"][0].reshape(4, WIDTH), step(2)["x"]) and not found["k"][1].any()
    session.write_pages(1, np.array([2]), session.read_pages(1, np.array([0])))
    fake = session.lane._package.fake
    assert fake.calls and all(call["compiler_args"] == ["--optlevel", "1"] for call in fake.calls)
    session.close()


def test_from_2_10_the_lane_is_compile_and_counts_what_the_cache_had(installed: Any, tmp_path: Path) -> None:
    backend = installed("2.10.1", stand_in.start)
    lane, _, programs = backend.capabilities.notes
    assert lane.startswith("lane compile") and "2.10.1" in lane and "device 'neuron'" in lane
    assert programs == f"compiled programs: {tmp_path / 'cache'}: cache_dir"
    session = backend.session(0)
    assert isinstance(session.lane, CompileLane)
    program = capture(session, DOUBLE)
    assert np.array_equal(program(step(1)).result("y"), step(1)["x"] * 2)
    assert session.lane._cache is not None and session.lane._cache.misses == 1
    session.close()


def test_ranks_that_meet_in_a_program_need_the_lane_compile(installed: Any) -> None:
    with pytest.raises(LayoutError, match=r"tp = 2: the lane trace has no collectives"):
        installed("2.9.0.2.15", lambda: torch.device("cpu"), world(tp=2))


def test_a_lane_that_the_version_does_not_have_is_refused(installed: Any) -> None:
    with pytest.raises(InvalidValue, match=r'lane = "compile" needs torch-neuronx 2\.10 or later'):
        installed("2.9.0.2.15", lambda: torch.device("cpu"), lane="compile")


# ---- memory ----------------------------------------------------------------------------------------------------------


class Given(UncountedMemory):
    """A memory that tells one pair of (total, free) after another, and the last for ever."""

    def __init__(self, *free: int) -> None:
        self.free, self.asked = list(free), 0

    def total_free(self) -> tuple[int, int]:
        self.asked += 1
        return 10**9, self.free[min(self.asked, len(self.free)) - 1]


def test_programs_share_what_was_free_before_the_first() -> None:
    """What is free later is less by what the programs themselves take, and would count them twice."""
    memory = Given(1000, 400, 0)
    room = Room(memory)
    for nbytes in (600, 300, 100):
        room.take(SHAPE, nbytes)
    with pytest.raises(OutOfMemory):
        room.take(SHAPE, 1)
    assert memory.asked == 1


def test_a_program_that_does_not_fit_is_refused_with_what_to_set() -> None:
    room = Room(Given(3 * 2**20))
    room.take(SHAPE, 2**20)
    with pytest.raises(
        OutOfMemory,
        match=r"program of 128 tokens and 2 rows the programs keep 3\.5 MiB .* that one 2\.5 MiB, and 3\.0 MiB were "
        r"free; .*prefill_buckets or decode_buckets under \[backend_options\], or lower cache\.pages or max_model_len",
    ):
        room.take(SHAPE, 5 * 2**19)
    room.take(SHAPE, 2 * 2**20)  # what was refused takes nothing


def test_where_nobody_tells_how_much_is_free_nothing_is_checked() -> None:
    room = Room(UncountedMemory())
    for _ in range(3):
        room.take(SHAPE, 2**60)


def test_a_session_refuses_a_bucket_that_does_not_fit_and_goes_on() -> None:
    def wide(x: torch.Tensor, arrays: Any, weights: Any) -> Any:
        return {"y": (x[:, None] * x[None]).sum(0)}

    session = started(Given(20_000))
    programs = {tokens: capture(session, giving(wide), tokens=tokens) for tokens in (4, 8)}
    before = stand_in.compiler().counts.compiled
    with pytest.raises(OutOfMemory, match=r"128 tokens and 1 rows .* leave large sizes out of prefill_buckets"):
        capture(session, giving(wide), tokens=128)
    assert stand_in.compiler().counts.compiled == before, "it is refused before it is compiled"
    programs[16] = capture(session, giving(wide), tokens=16)
    for tokens, program in programs.items():
        x = step(1, tokens)["x"]
        assert np.allclose(program(step(1, tokens)).result("y"), x * x.sum(0), atol=1e-4)
    assert sum(program.report.temporaries for program in programs.values()) < 20_000
    session.close()


def test_a_core_that_tells_its_memory_tells_total_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def told(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 3, 16

    monkeypatch.setattr(torch.accelerator, "get_memory_info", told, raising=False)
    memory = CoreMemory(torch.device("cpu"))
    assert memory.total_free() == (16, 3) and asked == [torch.device("cpu")]


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, AttributeError, ValueError])
def test_a_core_that_does_not_tell_its_memory_is_unknown(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(device: torch.device) -> Any:
        raise error("not on this device")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", silent, raising=False)
    memory = CoreMemory(stand_in.start())
    assert memory.total_free() is None and memory.page_bytes(kv()) == 2 * 4 * 2 * 4 * 4
    memory.synchronize()


@pytest.mark.parametrize("device", ["neuron", "cpu", "meta"])
def test_a_device_without_memory_of_its_own_does_not_tell(device: str) -> None:
    stand_in.start()
    assert CoreMemory(torch.device(device)).total_free() is None


def test_a_program_without_inputs_runs() -> None:
    session = started(Given(10_000))
    session.load({"w": const("w", np.arange(3, dtype=np.float32))}, None, {})

    def forward(ops: Any, weights: Any, caches: Any, inputs: Any, arrays: Any) -> Any:
        return {"y": weights["w"] + 1, "w": weights["w"]}, caches

    inputs = InputLayout([InputField("none", "int32", (0,))])
    program = session.capture(forward, StepShape(0, 1, (), 1, 1), inputs, Planned())
    found = program(HostStep(inputs))
    assert found.result("y").tolist() == [1, 2, 3] and found.result("w").tolist() == [0, 1, 2]
    session.close()


# ---- options ---------------------------------------------------------------------------------------------------------


def options(**given: Any) -> Any:
    """As the configuration validates them."""
    (info,) = lineshaft_backends()
    return validate_options(info, given)


@pytest.mark.parametrize("table", ["prefill_buckets", "decode_buckets"])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], r" = \[\] .*a list of one whole number or more: \[1, 2, 4\], or as text 1,2,4"),
        (8, r" = 8 .*a list of one whole number or more"),
        (None, " = None .*a list of"),
        ({"a": 1}, ".*a list of"),
        ([0, 8], r"\.0 = 0 .*greater than or equal to 1"),
        ([8, -16], r"\.1 = -16 .*greater than or equal to 1"),
        ([8, 4], r" = \[8, 4\] .*sizes have to ascend, each once: \[4, 8\], not \[8, 4\]"),
        ([4, 4, 8], r".*sizes have to ascend, each once: \[4, 8\], not \[4, 4, 8\]"),
        ([1.5], r"\.0 = 1\.5 .*valid integer"),
        ("", " = '' .*a list of one whole number or more"),
        ("8,few", r"\.1 = 'few' .*valid integer"),
        ("16,8", " = '16,8' .*sizes have to ascend"),
    ],
)
def test_a_table_that_is_none_is_refused_by_name(table: str, given: Any, says: str) -> None:
    with pytest.raises(InvalidValue, match=rf"backend_options\.{table}{says}"):
        options(**{table: given})


def test_a_table_may_come_as_text() -> None:
    found = options(prefill_buckets="128, 256", decode_buckets="[4, 8]")
    assert found.prefill_buckets == (128, 256) and found.decode_buckets == (4, 8)


@pytest.mark.parametrize("given", [True, "true"])
def test_the_stand_in_has_no_lane_trace(given: Any) -> None:
    with pytest.raises(InvalidValue, match=r'stand_in = true imitates the lane "compile" alone; set lane = "auto"'):
        options(stand_in=given, lane="trace")
    assert options(stand_in=given, lane="compile").stand_in


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lane": "xla"}, r"backend_options\.lane = 'xla' .*'auto', 'compile' or 'trace'"),
        ({"stand_in": "maybe"}, r"backend_options\.stand_in = 'maybe' .*valid boolean"),
        ({"cache_dir": ""}, r"backend_options\.cache_dir = '' .*at least 1 character"),
        ({"attention_memory_mib": 0}, r"attention_memory_mib = 0 .*greater than or equal to 1"),
    ],
)
def test_another_value_that_means_nothing_is_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        options(**given)


def test_an_unknown_option_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownKey, match=r"'neuron' has no option .*prefil_buckets; did you mean .*prefill_buckets"):
        options(prefil_buckets=[8])
