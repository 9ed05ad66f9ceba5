"""What the probe says of machines with Neuron devices and without, and of what is installed; what it must not do."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.neuron_plugin.fake_neuronx import PLACEHOLDER, forget, write_machine, write_package

from lineshaft_neuron import probe as neuron
from lineshaft_neuron.probe import Device, Machine, devices, driver_loaded, installed_package, numbers, probe


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    return lambda **facts: write_machine(tmp_path / "machine", **facts)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a torch_neuronx, beside a PyTorch of a version."""
    forget(monkeypatch)
    real = importlib.metadata.version

    def install(torch: str = "2.9.1", **facts: str) -> None:
        write_package(tmp_path / "site", **facts)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setattr(importlib.metadata, "version", lambda name: torch if name == "torch" else real(name))

    return install


def test_a_machine_with_devices_and_the_package_is_usable(machine: Any, installed: Any) -> None:
    installed()
    found = probe(machine())
    assert found.usable and found.devices == ("neuron0 (Trainium2, 8 cores)", "neuron1 (Trainium2, 8 cores)")
    assert "2.9.0.2.15.32035" in found.reason and found.unless == {"stand_in": "true"}


def test_a_machine_without_a_driver_says_what_was_looked_for_and_what_runs_all_the_same(machine: Any) -> None:
    found = probe(machine(devices=0, driver=False))
    assert not found.usable and found.unless == {"stand_in": "true"} and not found.devices
    for told in ('no "neuron"', "lists no device", "aws-neuronx-dkms", "stand_in = true", "--backend-option"):
        assert told in found.reason
    assert found.runs_with({"stand_in": "yes"}) and not found.runs_with({}) and not found.runs_with({"stand_in": "no"})


def test_a_driver_without_a_device_is_told_from_no_driver(machine: Any) -> None:
    assert "the driver is loaded" in probe(machine(devices=0)).reason


def test_devices_that_a_container_does_not_have_are_said(machine: Any, installed: Any) -> None:
    installed()
    found = probe(machine(nodes=False))
    assert not found.usable and "in a container, give it the devices' nodes" in found.reason and found.devices


def test_an_absent_package_is_said_with_where_it_is_from(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe(machine())
    assert not found.usable and found.reason.startswith("torch-neuronx is not installed; install torch-neuronx from")
    assert "vendor's own package index" in found.reason and "stand_in" in found.unless


@pytest.mark.parametrize("present", [True, False])
def test_the_placeholder_of_the_public_index_is_named_as_such(machine: Any, installed: Any, present: bool) -> None:
    installed(**PLACEHOLDER)
    found = probe(machine(devices=2 if present else 0))
    assert not found.usable and "torch-neuronx 1.0 is installed, the placeholder of the public index" in found.reason
    assert "uninstall it, and install torch-neuronx from the vendor's own package index" in found.reason


def test_a_placeholder_of_another_version_is_known_by_what_it_says(installed: Any) -> None:
    installed(version="2.10.0", told="Wrong package. Please install another")
    package = installed_package()
    assert package and package.placeholder and package.version == "2.10.0"


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"version": "2.8.0.2.10.1"}, "2.8.0.2.10.1 is installed, and 2.9 is the oldest"),
        ({"version": "2.9.0.2.15.1", "torch": "2.10.0"}, "is made for PyTorch 2.9, and 2.10.0 is installed"),
        ({"torch": "2.8.0"}, "PyTorch 2.8.0 is installed, and 2.9 is the oldest"),
    ],
)
def test_a_wrong_version_is_said_with_what_to_do(machine: Any, installed: Any, facts: Any, says: str) -> None:
    installed(**facts)
    found = probe(machine())
    assert not found.usable and says in found.reason and "install" in found.reason


def test_nothing_runs_without_torch(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron, "find_spec", lambda name: None)
    found = probe(machine())
    assert not found.usable and not found.unless and found.reason.startswith("PyTorch is not installed")
    assert not probe(Machine(*map(Path, ("/absent", "/absent", "/absent")))).unless


def test_devices_are_listed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name, cores in (("neuron10", "2"), ("neuron2", "many"), ("neuron", "1"), ("power", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "core_count").write_text(cores)
    assert list(devices(tmp_path)) == [Device("neuron2", "", 0), Device("neuron10", "", 2)]
    assert Device("neuron2", "", 0).text == "neuron2 (number of cores unknown)"
    assert not list(devices(tmp_path / "absent"))


@pytest.mark.parametrize(("line", "loaded"), [("244 neuron", True), ("244 neuron_other", False), ("neuron", False)])
def test_the_driver_is_known_by_its_major(tmp_path: Path, line: str, loaded: bool) -> None:
    (tmp_path / "devices").write_text(f"Character devices:\n  1 mem\n{line}\n")
    assert driver_loaded(tmp_path / "devices") is loaded and not driver_loaded(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "found"), [("2.9.0.2.15+5e", (2, 9, 0, 2, 15)), ("2.10", (2, 10)), ("", ()), ("dev", ()), ("9" * 99, ())]
)
def test_versions_are_read_as_numbers(text: str, found: tuple[int, ...]) -> None:
    assert numbers(text) == found


def test_a_probe_imports_no_package_of_the_vendor_and_starts_no_runtime(tmp_path: Path) -> None:
    """In a process of its own, with a package that would end it."""
    write_package(tmp_path / "site", source="raise SystemExit('imported')")
    write_machine(tmp_path / "machine")
    code = (
        "import sys; from pathlib import Path; from lineshaft_neuron.probe import Machine, probe\n"
        f"root = Path({str(tmp_path / 'machine')!r})\n"
        "probe(); found = probe(Machine(root / 'devices', root / 'sys', root / 'dev'))\n"
        "assert found.devices, found\n"
        "print(sorted({'torch', 'torch_neuronx', 'torch_xla'} & set(sys.modules)))\n"
        "print('libnrt' in Path('/proc/self/maps').read_text(), found.reason)"
    )
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    modules, runtime = done.stdout.splitlines()
    assert modules == "[]" and runtime.startswith("False") and "2.9.0.2.15.32035" in runtime
