"""What a rank needs before it can run on a Neuron core: the lane that the installed torch-neuronx has, a core of its
own, and the package itself. Sets the variables that the runtime reads when it starts."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from lineshaft_contract.backends import World
from lineshaft_contract.errors import BackendUnavailable, InvalidValue, LayoutError
from lineshaft_neuron.caching import Setup, set_up
from lineshaft_neuron.options import NeuronOptions
from lineshaft_neuron.probe import (
    FIRST_WITH_DEVICE,
    FROM_VENDOR,
    OLDEST_PACKAGE,
    PACKAGE,
    Machine,
    devices,
    numbers,
    package_fault,
    version_of,
)

VISIBLE = "NEURON_RT_VISIBLE_CORES"
HOW_MANY = "NEURON_RT_NUM_CORES"
GROUPED = "NEURON_LOGICAL_NC_CONFIG"
NO_FALLBACK = "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION"
"""Without it a program of the lane "compile" that fails runs op by op instead, and says so in a log alone."""
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
MACHINE = Machine()
MEETING_AXES = ("cp", "ep", "tp")
"""Mesh axes whose ranks meet within a program."""


@dataclass(frozen=True)
class Runtime:
    """A started torch-neuronx: its lane, why that one, its device, and what was set up for its compiler."""

    lane: str
    reason: str
    version: str
    package: ModuleType
    device: torch.device
    cores: str
    setup: Setup


def start_runtime(options: NeuronOptions, world: World, machine: Machine = MACHINE) -> Runtime | None:
    """torch-neuronx, started for this rank on a core of its own; None with stand_in = true, which starts nothing.

    Raises BackendUnavailable where the package or the cores cannot be had, InvalidValue for an option or variable that
    makes no sense, LayoutError for a layout that the lane or the cores cannot hold.
    """
    if options.stand_in:
        require_free_name()
        return None
    if fault := package_fault():
        raise BackendUnavailable(fault)
    version = version_of(PACKAGE)
    lane, reason = choose_lane(options, version)
    require_layout(lane, world)
    cores = core_variables(os.environ, world, sum(device.cores for device in devices(machine.devices)))
    setup = set_up(options, lane, os.environ)
    os.environ.update({NO_FALLBACK: "1", **setup.variables, **cores})
    package = import_package()
    with runtime_errors():
        device = first_use()
    return Runtime(lane, reason, version, package, device, ", ".join(f"{n}={v}" for n, v in cores.items()), setup)


def first_use() -> torch.device:
    """The only core that this process sees, which from now on is its own: the first tensor starts the runtime."""
    try:
        device = torch.device("neuron", 0)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"torch-neuronx {version_of(PACKAGE)} is imported, and PyTorch knows no device 'neuron' ({_line(error)}); "
            f"{FROM_VENDOR}, of the release that is made for this PyTorch"
        ) from error
    torch.zeros(1).to(device).cpu()
    return device


def choose_lane(options: NeuronOptions, version: str) -> tuple[str, str]:
    """The lane, "compile" or "trace", and why it is that one. `version` is that of the installed torch-neuronx.

    Raises BackendUnavailable for a version that has neither, InvalidValue for a lane that the version does not have.
    """
    have = numbers(version)[:2]
    if have < OLDEST_PACKAGE:
        raise BackendUnavailable(
            f"torch-neuronx {version or 'without a version'} is installed, and the oldest lane, trace, needs 2.9; "
            f"{FROM_VENDOR}"
        )
    lane = "compile" if have >= FIRST_WITH_DEVICE else "trace"
    if options.lane == lane or options.lane == "auto":
        chosen = ' (lane = "auto")' if options.lane == "auto" else ""
        has = "has the device 'neuron'" if lane == "compile" else "is built on PyTorch/XLA, the last that is"
        return lane, f"lane {lane}{chosen}: torch-neuronx {version} {has}"
    needs = "2.10 or later" if options.lane == "compile" else "2.9"
    raise InvalidValue(
        f'lane = "{options.lane}" needs torch-neuronx {needs}, and {version} is installed; set lane = "{lane}" or '
        f'"auto", or install torch-neuronx {needs}'
    )


def require_layout(lane: str, world: World) -> None:
    """Raises LayoutError where ranks would have to meet within a traced program, which is compiled for one core."""
    split = [f"{axis} = {world.degree(axis)}" for axis in MEETING_AXES if world.degree(axis) > 1]
    if lane == "trace" and split:
        raise LayoutError(
            f"{', '.join(split)}: the lane trace has no collectives, since torch_neuronx.trace compiles for one core; "
            "set these to 1, or install torch-neuronx 2.10 or later, whose lane has them"
        )


def require_free_name(modules: Mapping[str, object] = sys.modules) -> None:
    """Raises BackendUnavailable where torch-neuronx already has the name of the device that the stand-in imitates."""
    if PACKAGE in modules:
        raise BackendUnavailable(
            f'{PACKAGE} is imported, and its device is called "neuron" as the stand-in\'s would be; set stand_in = '
            f"false to run on the device, or {AUTOLOAD}=0 in the environment, so that PyTorch does not import it"
        )


def import_package() -> ModuleType:
    """torch_neuronx. Raises BackendUnavailable, with what was said, where it cannot be imported."""
    try:
        return importlib.import_module(PACKAGE)
    except (Exception, SystemExit) as error:  # its libraries raise what they like
        raise BackendUnavailable(
            f"torch-neuronx {version_of(PACKAGE)} cannot be imported ({type(error).__name__}: {_line(error)}); "
            f"{FROM_VENDOR}, with the compiler and the runtime of the same release"
        ) from error


def core_variables(environment: Mapping[str, str], world: World, physical: int = 0) -> dict[str, str]:
    """The variables that give this rank one core.

    NEURON_RT_VISIBLE_CORES lists the cores of all ranks: rank r takes the r-th. Where it is not set, a single rank
    takes any core that is free, and several take those of their numbers. `physical` is how many the machine has, 0
    where that is unknown; NEURON_LOGICAL_NC_CONFIG says how many of them make one that can be taken.

    Raises InvalidValue for a variable that cannot be read, LayoutError for fewer cores than ranks.
    """
    grouped = _whole(environment, GROUPED, (1, 2)) or 1
    _whole(environment, HOW_MANY, range(1025))
    listed = listed_cores(environment[VISIBLE]) if environment.get(VISIBLE) else None
    if listed is None and world.size == 1:
        return {HOW_MANY: "1"}
    count = len(listed) if listed is not None else physical // grouped
    if count and count < world.size:
        have = f"{VISIBLE} = {environment[VISIBLE]!r} lists" if listed is not None else "the machine has"
        raise LayoutError(
            f"the layout has {world.size} ranks, one on a core each, and {have} {count}; lower a degree"
            + (f", or list {world.size} cores" if listed is not None else "")
        )
    return {VISIBLE: str(world.rank if listed is None else listed[world.rank])}


def listed_cores(setting: str) -> list[int]:
    """The cores that NEURON_RT_VISIBLE_CORES names: numbers and ranges with both ends, separated by commas.

    Raises InvalidValue for anything else, and for a core that is named twice.
    """
    cores: list[int] = []
    for part in setting.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise InvalidValue(
                f"{VISIBLE} = {setting!r} cannot be read at {part!r}; write cores such as 0, 0-3 or 0,2,5"
            )
        cores += range(first, last + 1)
    if len(set(cores)) < len(cores):
        raise InvalidValue(f"{VISIBLE} = {setting!r} names a core twice; name each once")
    return cores


@contextmanager
def runtime_errors() -> Iterator[None]:
    """What the runtime says within, as it starts, becomes a BackendUnavailable that says what to do.

    A core belongs to the first process that takes it until that process ends. To the next one the runtime says so in
    its log, and of its error it often tells no more than a status.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        held = (
            "the cores may be in use by another process, which holds them until it ends (`neuron-ls` lists it); end "
            f"that process, or name other cores by {VISIBLE}"
        )
        raise BackendUnavailable(f"the Neuron runtime does not start ({_line(error)}); {held}") from error


def _whole(environment: Mapping[str, str], name: str, allowed: Sequence[int]) -> int:
    """A variable that is a whole number, 0 where it is not set. Raises InvalidValue for any other value."""
    text = environment.get(name, "").strip()
    if not text:
        return 0
    if not re.fullmatch(r"\d{1,4}", text, re.ASCII) or int(text) not in allowed:
        spelled = " or ".join(map(str, allowed)) if len(allowed) < 4 else f"{allowed[0]} to {allowed[-1]}"
        raise InvalidValue(f"{name} = {text!r} in the environment; it has to be {spelled}, or unset")
    return int(text)


def _line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.300}"
