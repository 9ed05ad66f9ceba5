"""The evidence word follows from switches and device nodes, never from what the plugin says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lineshaft_conformance.evidence import boasts, evidence_of, interpreters, os_devices
from lineshaft_conformance.results import Evidence
from lineshaft_contract.backends import BackendInfo, BackendKind, Probe

NODE = "/dev/accel0"


def info(kind: BackendKind = BackendKind.ACCELERATOR) -> BackendInfo:
    return BackendInfo("x", probe="x:probe", factory="x:create", kind=kind)


def word(
    kind: BackendKind, options: Mapping[str, Any] = {}, environment: Mapping[str, str] = {}, *nodes: str
) -> tuple[str, str]:
    return evidence_of(info(kind), options, environment, lambda: nodes)


@pytest.mark.parametrize("kind", [BackendKind.HOST, BackendKind.REFERENCE])
def test_what_runs_on_the_host_is_executed_there(kind: BackendKind) -> None:
    assert word(kind) == (Evidence.EXECUTED, "on the host's processor")
    assert word(kind, {"platform": "cpu", "interpret": False, "stand_in": None})[0] is Evidence.EXECUTED


def test_an_accelerator_is_executed_only_where_the_system_shows_one() -> None:
    assert word(BackendKind.ACCELERATOR)[0] is Evidence.INTERPRETED
    assert word(BackendKind.ACCELERATOR, {}, {}, NODE) == (Evidence.EXECUTED, f"the operating system shows {NODE}")


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        ({"interpret": True}, {}, "option interpret"),
        ({"stand_in": "torch"}, {}, "option stand_in"),
        ({"platform": "CPU"}, {}, "option platform"),
        ({}, {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1"),
        ({}, {"JAX_PLATFORMS": "cpu"}, "JAX_PLATFORMS=cpu"),
    ],
)
def test_a_switch_makes_it_interpreted_beside_a_device_too(
    options: dict[str, Any], environment: dict[str, str], said: str
) -> None:
    found, why = word(BackendKind.ACCELERATOR, options, environment, NODE)
    assert found is Evidence.INTERPRETED
    assert said in why


@pytest.mark.parametrize("value", ["", "0", "false", "OFF"])
def test_a_switch_that_is_off_is_off(value: str) -> None:
    assert word(BackendKind.ACCELERATOR, {"interpret": value}, {"TRITON_INTERPRET": value}, NODE)[0] == "executed"


def test_interpreting_switches_hold_on_the_host_too() -> None:
    assert word(BackendKind.HOST, {"interpret": 1})[0] is Evidence.INTERPRETED
    assert word(BackendKind.HOST, {}, {"TRITON_INTERPRET": "1"})[0] is Evidence.INTERPRETED


def test_code_whose_instructions_are_emulated_is_interpreted() -> None:
    evidence, why = word(BackendKind.HOST, {"native": "amx_emulated"})
    assert evidence is Evidence.INTERPRETED and why == "the option native = 'amx_emulated' is set"
    assert word(BackendKind.HOST, {"native": "amx"})[0] is Evidence.EXECUTED
    assert list(interpreters({"native": "amx_emulated"}, {})), "its times say nothing of a roofline"


@pytest.mark.parametrize("name", ["nvidia0", "accel0", "accel/accel3", "vfio/12", "neuron1"])
def test_nodes_of_accelerators_are_found(tmp_path: Path, name: str) -> None:
    node = tmp_path / name
    node.parent.mkdir(exist_ok=True)
    node.touch()
    (tmp_path / "nvidiactl").touch()
    assert os_devices(tmp_path, Path.is_file) == (str(node),)
    assert os_devices(tmp_path) == (), "a plain file is no device"


def test_a_render_node_counts_only_beside_kfd(tmp_path: Path) -> None:
    (tmp_path / "dri").mkdir()
    (tmp_path / "dri" / "renderD128").touch()
    assert os_devices(tmp_path, Path.is_file) == ()
    (tmp_path / "kfd").touch()
    assert os_devices(tmp_path, Path.is_file) == (str(tmp_path / "dri" / "renderD128"),)


def test_a_system_without_such_nodes_shows_none(tmp_path: Path) -> None:
    assert os_devices(tmp_path / "absent") == ()
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()
    assert os_devices(tmp_path, Path.is_file) == ()


def test_a_probe_that_names_devices_which_are_not_there_boasts() -> None:
    boasting = Probe(True, "found", ("X100",))
    said = boasts(info(), boasting, {}, {}, tuple)
    assert said and "X100" in said
    assert boasts(info(), boasting, {}, {}, lambda: (NODE,)) is None
    assert boasts(info(), boasting, {"stand_in": True}, {}, tuple) is None
    assert boasts(info(), Probe(True, "by AOT"), {}, {}, tuple) is None
    assert boasts(info(), Probe(False, "no driver", ("X100",)), {}, {}, tuple) is None
    assert boasts(info(BackendKind.HOST), Probe(True, "", ("2 cores",)), {}, {}, tuple) is None
