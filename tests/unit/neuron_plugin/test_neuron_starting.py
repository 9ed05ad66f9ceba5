"""Starting a rank on a Neuron core: which lane and core it takes, and what is said where it cannot start. The package
and the runtime's answers are faked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.unit.neuron_plugin.fake_neuronx import PLACEHOLDER, forget, write_machine, write_package

from lineshaft.errors import BackendUnavailable, InvalidValue, LayoutError
from lineshaft_contract.backends import World
from lineshaft_neuron import starting
from lineshaft_neuron.options import NeuronOptions
from lineshaft_neuron.starting import (
    choose_lane,
    core_variables,
    import_package,
    listed_cores,
    require_free_name,
    require_layout,
    runtime_errors,
    start_runtime,
)


def world(rank: int = 0, **degrees: int) -> World:
    return World(rank, tuple((axis, degrees.get(axis, 1)) for axis in ("dp", "pp", "cp", "ep", "tp")))


ONE = world()
FOUR = [world(rank, tp=4) for rank in range(4)]
OURS = (
    "NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES", "NEURON_LOGICAL_NC_CONFIG", "NEURON_CC_FLAGS",
    "NEURON_COMPILE_CACHE_URL", "TORCH_NEURONX_NEFF_CACHE_DIR", "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR",
    "TORCH_NEURONX_HLO_CACHE_DIR", "TORCH_NEURONX_NEFF_DISABLE_CACHE", "TORCH_NEURONX_DISABLE_NEFF_CACHE",
    "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION",
)  # fmt: skip


@pytest.fixture(autouse=True)
def unset_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in OURS:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget(monkeypatch)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Start on a machine with two devices of eight cores and a torch_neuronx of a version, whose runtime answers."""
    monkeypatch.setattr(starting, "first_use", lambda: torch.device("cpu"))

    def begin(options: dict[str, Any] | None = None, place: World = ONE, **facts: str) -> Any:
        write_package(tmp_path / "site", **facts)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        version = facts.get("version", "2.9.0.2.15.32035")
        monkeypatch.setattr("lineshaft_neuron.probe.version_of", lambda name: version)
        return start_runtime(NeuronOptions(**options or {}), place, write_machine(tmp_path / "machine"))

    return begin


# ---- the lane --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "version", "lane"),
    [
        ("auto", "2.10.1", "compile"), ("auto", "2.13.3.0", "compile"), ("auto", "3.0", "compile"),
        ("auto", "2.9.0.2.15", "trace"), ("trace", "2.9.0.2.15", "trace"), ("compile", "2.10.0", "compile"),
    ],
)  # fmt: skip
def test_the_installed_version_has_one_lane(asked: Any, version: str, lane: str) -> None:
    found, reason = choose_lane(NeuronOptions(lane=asked), version)
    assert found == lane and reason.startswith(f"lane {lane}") and f"torch-neuronx {version}" in reason


@pytest.mark.parametrize(
    ("asked", "version", "says"),
    [
        (
            "compile",
            "2.9.0.2.15",
            'lane = "compile" needs torch-neuronx 2.10 or later, and 2.9.0.2.15 is installed; set',
        ),
        (
            "trace",
            "2.13.3.0",
            'lane = "trace" needs torch-neuronx 2.9, and 2.13.3.0 is installed; set lane = "compile"',
        ),
    ],
)
def test_a_lane_that_the_version_does_not_have_is_refused(asked: Any, version: str, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        choose_lane(NeuronOptions(lane=asked), version)


@pytest.mark.parametrize("version", ["2.8.0.2.10", "1.13.1", "", "unknown"])
@pytest.mark.parametrize("asked", ["auto", "trace", "compile"])
def test_a_version_without_a_lane_is_refused(asked: Any, version: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"trace, needs 2\.9; install torch-neuronx from the vendor's"):
        choose_lane(NeuronOptions(lane=asked), version)


def test_ranks_that_meet_in_a_program_have_no_traced_one() -> None:
    require_layout("trace", world(dp=4, pp=2))
    require_layout("compile", world(tp=4))
    with pytest.raises(LayoutError, match=r"ep = 2, tp = 4: the lane trace has no collectives.*2\.10 or later"):
        require_layout("trace", world(ep=2, tp=4))


# ---- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "cores"),
    [("0", [0]), ("4-6", [4, 5, 6]), ("0,2, 5-6", [0, 2, 5, 6]), (" 3 ", [3]), ("7-7", [7]), ("2,0", [2, 0])],
)
def test_a_list_of_cores_is_read_as_the_runtime_reads_it(setting: str, cores: list[int]) -> None:
    assert listed_cores(setting) == cores


@pytest.mark.parametrize("setting", ["a", "3-1", "0,", "-1", "0-", "1.5", "0 1", "0--2", "\u0661", "99999", "0-1-2"])
def test_a_list_of_cores_that_cannot_be_read_is_refused(setting: str) -> None:
    with pytest.raises(InvalidValue, match=r"NEURON_RT_VISIBLE_CORES = .* cannot be read at .*such as 0, 0-3"):
        core_variables({"NEURON_RT_VISIBLE_CORES": setting}, world())


@pytest.mark.parametrize("setting", ["0,0", "0-3,2"])
def test_a_core_named_twice_is_refused(setting: str) -> None:
    with pytest.raises(InvalidValue, match="names a core twice"):
        listed_cores(setting)


def test_each_rank_takes_its_own_of_the_cores_that_the_user_lists() -> None:
    listed = {"NEURON_RT_VISIBLE_CORES": "4-6,9"}
    assert [core_variables(listed, place)["NEURON_RT_VISIBLE_CORES"] for place in FOUR] == ["4", "5", "6", "9"]


def test_ranks_take_the_cores_of_their_numbers_and_a_single_one_any_that_is_free() -> None:
    assert [core_variables({}, place) for place in FOUR] == [{"NEURON_RT_VISIBLE_CORES": str(n)} for n in range(4)]
    assert core_variables({}, world()) == {"NEURON_RT_NUM_CORES": "1"}


def test_what_a_rank_has_set_for_itself_it_reads_again_unchanged() -> None:
    once = core_variables({"NEURON_RT_VISIBLE_CORES": "5-7"}, world())
    assert once == {"NEURON_RT_VISIBLE_CORES": "5"} == core_variables(once, world())
    assert core_variables(core_variables({}, world()), FOUR[2]) == {"NEURON_RT_VISIBLE_CORES": "2"}


@pytest.mark.parametrize(
    ("environment", "physical", "says"),
    [
        (
            {"NEURON_RT_VISIBLE_CORES": "0-2"},
            16,
            "4 ranks, one on a core each, and NEURON_RT_VISIBLE_CORES = '0-2' lists 3",
        ),
        ({}, 2, "4 ranks, one on a core each, and the machine has 2; lower a degree"),
        ({"NEURON_LOGICAL_NC_CONFIG": "2"}, 6, "the machine has 3"),
    ],
)
def test_fewer_cores_than_ranks_are_refused(environment: dict[str, str], physical: int, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        core_variables(environment, FOUR[0], physical)


@pytest.mark.parametrize(
    ("name", "value"),
    [("NEURON_LOGICAL_NC_CONFIG", "3"), ("NEURON_LOGICAL_NC_CONFIG", "two"), ("NEURON_RT_NUM_CORES", "-1")],
)
def test_a_variable_that_is_no_number_it_may_be_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidValue, match=f"{name} = '{value}' in the environment; it has to be"):
        core_variables({name: value}, world())


@pytest.mark.parametrize(
    "said",
    [
        "Failed to initialize Neuron Runtime: status code 1",
        "NRT:nrt_allocate_neuron_cores NeuronCore(s) not available - Requested:nc1-nc1\n Available:0",
        "The PyTorch Neuron Runtime could not be initialized",
    ],
)
def test_cores_in_use_are_said_with_what_to_set(said: str) -> None:
    with (
        pytest.raises(
            BackendUnavailable, match=r"in use by another process.*end that process, or name other cores"
        ) as told,
        runtime_errors(),
    ):
        raise RuntimeError(said)
    assert " ".join(said.split()) in str(told.value) and "NEURON_RT_VISIBLE_CORES" in str(told.value)


# ---- the package -----------------------------------------------------------------------------------------------------


def test_a_start_takes_a_core_a_lane_and_a_cache_before_the_package_is_imported(start: Any, tmp_path: Path) -> None:
    source = "import os\nseen = {n: v for n, v in os.environ.items() if 'NEURON' in n}"
    found = start(place=world(1, dp=2), source=source)
    assert found.lane == "trace" and found.version == "2.9.0.2.15.32035" and "PyTorch/XLA" in found.reason
    assert found.cores == "NEURON_RT_VISIBLE_CORES=1" and isinstance(found.package, ModuleType)
    folder = str(tmp_path / "cache" / "lineshaft" / "neuron")
    assert found.package.seen["NEURON_RT_VISIBLE_CORES"] == "1"
    assert found.package.seen["NEURON_COMPILE_CACHE_URL"] == folder == str(found.setup.cache.folder)
    assert found.package.seen["TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION"] == "1"


def test_a_version_with_a_device_starts_the_lane_compile(start: Any) -> None:
    found = start(version="2.10.1", place=world(3, tp=4))
    assert found.lane == "compile" and "has the device 'neuron'" in found.reason
    assert os.environ["TORCH_NEURONX_NEFF_CACHE_DIR"] == str(found.setup.cache.folder)


def test_the_absent_package_and_the_placeholder_are_said(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="torch-neuronx is not installed; install"):
        start_runtime(NeuronOptions(), world())
    with pytest.raises(BackendUnavailable, match=r"torch-neuronx 1\.0 is installed, the placeholder"):
        start(**PLACEHOLDER)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise ImportError('libnrt.so.1: cannot open')", r"ImportError: libnrt\.so\.1: cannot open"),
        ("raise RuntimeError('no\\n driver')", "RuntimeError: no driver"),
    ],
)
def test_a_package_that_cannot_be_imported_is_said(start: Any, source: str, says: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"cannot be imported \({says}\); install.*of the same release"):
        start(source=source)


def test_a_busy_core_ends_the_start(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> torch.device:
        raise RuntimeError("Failed to initialize Neuron Runtime: status code 1")

    monkeypatch.setattr(starting, "first_use", busy)
    with pytest.raises(BackendUnavailable, match=r"status code 1.*NEURON_RT_VISIBLE_CORES"):
        start()


def test_the_stand_in_starts_nothing_whether_the_package_is_installed_or_not(start: Any) -> None:
    before = dict(os.environ)
    assert start_runtime(NeuronOptions(stand_in=True), world()) is None
    assert start({"stand_in": True}, source="raise SystemExit('imported')") is None
    assert dict(os.environ) == before


def test_the_stand_in_needs_the_name_of_the_device() -> None:
    require_free_name({})
    with pytest.raises(BackendUnavailable, match=r"torch_neuronx is imported.*stand_in = false.*AUTOLOAD=0"):
        require_free_name({"torch_neuronx": object()})


def test_the_package_is_imported_as_it_is(start: Any) -> None:
    start(source="marker = 1")
    assert import_package().marker == 1
