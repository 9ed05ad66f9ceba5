"""Looks whether the Neuron backend can run here: at the kernel's lists of devices, and at what is installed. Imports
neither PyTorch nor torch-neuronx, and never starts the runtime, which would take every core for this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lineshaft_contract.backends import Probe

PACKAGE = "torch_neuronx"
OLDEST_TORCH = OLDEST_PACKAGE = (2, 9)
FIRST_WITH_DEVICE = (2, 10)
"""torch-neuronx of which PyTorch knows the device "neuron"; the one before is the last that is built on PyTorch/XLA."""

STAND_IN = {"stand_in": "true"}
INSTEAD = (
    'for checks on a stand-in for it, on the CPU, set backend = "neuron", and stand_in = true under [backend_options] '
    "or by --backend-option"
)
FROM_VENDOR = (
    "install torch-neuronx from the vendor's own package index, which its documentation calls the Neuron pip "
    "repository; the one of that name on the public index is a placeholder"
)


@dataclass(frozen=True)
class Machine:
    """Where a probe looks; a test may look elsewhere."""

    majors: Path = Path("/proc/devices")
    devices: Path = Path("/sys/devices/virtual/neuron_device")
    nodes: Path = Path("/dev")


@dataclass(frozen=True)
class Device:
    """One Neuron device as the driver lists it; `cores` are physical ones, 0 where the driver does not tell."""

    name: str
    kind: str
    cores: int

    @property
    def text(self) -> str:
        cores = f"{self.cores} cores" if self.cores else "number of cores unknown"
        return f"{self.name} ({self.kind + ', ' if self.kind else ''}{cores})"


@dataclass(frozen=True)
class Package:
    """The installed torch-neuronx, by its metadata: "" for a version that is not told."""

    version: str
    placeholder: bool


def probe(machine: Machine = Machine()) -> Probe:
    """Usable where the driver lists a device and a torch-neuronx is installed that fits the installed PyTorch."""
    torch = torch_fault()
    unless = {} if torch else STAND_IN
    found = list(devices(machine.devices))
    shown = tuple(device.text for device in found)
    if not found:
        missing = torch or package_fault()
        return Probe(False, f"{_nothing(machine)}; {INSTEAD}{missing and f' ({missing})'}", unless=unless)
    reason = torch or _hidden(machine, found) or package_fault()
    return Probe(not reason, reason or f"the driver is loaded, torch-neuronx {version_of(PACKAGE)}", shown, unless)


def devices(folder: Path) -> Iterator[Device]:
    """The devices that the driver lists: folders neuron0, neuron1, ... with a file `core_count` each."""
    names = (found for name in _listed(folder) if (found := re.fullmatch(r"neuron(\d{1,4})", name, re.ASCII)))
    for name in sorted(names, key=lambda name: int(name[1])):
        path = folder / name[0]
        cores = _text(path / "core_count")
        kind = _text(path / "info" / "architecture" / "device_name")
        yield Device(name[0], kind, int(cores) if re.fullmatch(r"\d{1,4}", cores, re.ASCII) else 0)


def driver_loaded(majors: Path) -> bool:
    """Whether the kernel has given a major number to the Neuron driver."""
    return any(line.split()[1:] == ["neuron"] for line in _text(majors).splitlines())


def torch_fault() -> str:
    """What is wrong with the installed PyTorch; "" if nothing is. The stand-in needs it too."""
    if find_spec("torch") is None:
        return "PyTorch is not installed; run `pip install torch`"
    version = version_of("torch")
    if version and numbers(version)[:2] < OLDEST_TORCH:
        return f"PyTorch {version} is installed, and {_dotted(OLDEST_TORCH)} is the oldest that is supported; update it"
    return ""


def package_fault() -> str:
    """What is wrong with the installed torch-neuronx; "" if nothing is, as far as can be told without importing it."""
    package = installed_package()
    if package is None:
        return f"torch-neuronx is not installed; {FROM_VENDOR}"
    if package.placeholder:
        return (
            f"torch-neuronx {package.version} is installed, the placeholder of the public index, which cannot be "
            f"imported; uninstall it, and {FROM_VENDOR}"
        )
    have, torch = numbers(package.version)[:2], numbers(version_of("torch"))[:2]
    if have < OLDEST_PACKAGE:
        told = f"torch-neuronx {package.version}" if package.version else "a torch-neuronx without a version"
        return f"{told} is installed, and {_dotted(OLDEST_PACKAGE)} is the oldest that is supported; {FROM_VENDOR}"
    if torch and have != torch:
        return (
            f"torch-neuronx {package.version} is made for PyTorch {_dotted(have)}, and {version_of('torch')} is "
            f"installed; install PyTorch {_dotted(have)}, or the torch-neuronx that is made for {_dotted(torch)}"
        )
    return ""


def installed_package() -> Package | None:
    """The installed torch-neuronx, or None; by its files alone."""
    if find_spec(PACKAGE) is None:
        return None
    try:
        found = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        return Package("", placeholder=False)
    version, told = found["Version"] or "", f"{found.get('Summary', '')} {found.get_payload()}"  # type: ignore[attr-defined]
    return Package(version, placeholder=version == "1.0" or "WRONG PACKAGE" in told.upper())


def version_of(package: str) -> str:
    """The version that an installed package's metadata tell; "" where there are none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.9.0.2.15.32035+5e" is (2, 9, 0, 2, 15, 32035)."""
    found = re.match(r"\d{1,9}(?!\d)(\.\d{1,9}(?!\d))*", version, re.ASCII)
    return tuple(map(int, found[0].split("."))) if found else ()


def _nothing(machine: Machine) -> str:
    """What was looked for, and what was found, where the driver lists no device."""
    if driver_loaded(machine.majors):
        return f"no Neuron device: the driver is loaded ({machine.majors}), and {machine.devices} lists no device"
    return (
        f'no Neuron device: the driver is not loaded ({machine.majors} has no "neuron", and {machine.devices} lists no '
        "device); on a machine with one, install its package aws-neuronx-dkms"
    )


def _hidden(machine: Machine, found: list[Device]) -> str:
    """Why no device can be opened that the driver lists; "" if one can be."""
    if any((machine.nodes / device.name).exists() for device in found):
        return ""
    return (
        f"the driver lists {', '.join(device.name for device in found)}, and {machine.nodes} has no node of that name; "
        "in a container, give it the devices' nodes"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
