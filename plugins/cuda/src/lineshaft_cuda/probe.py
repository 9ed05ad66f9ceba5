"""Looks whether the cuda backend can run here: at device nodes, the driver, and what is installed. Imports neither
PyTorch nor Triton, and creates no context on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lineshaft_contract.backends import Probe
from lineshaft_cuda.nvml import LIBRARY, Driver, Gpu, NvmlError, read_driver
from lineshaft_triton.probing import (
    INTERPRETED,
    TorchBuild,
    interpreter_missing,
    listed,
    no_device,
    numbers,
    torch_build,
    visible,
    whole_number,
)
from lineshaft_triton.targets import kernels_for_any

VARIABLE = "CUDA_VISIBLE_DEVICES"
NODE = "nvidia"
ONE_SLICE = "MIG-"


@dataclass(frozen=True)
class Machine:
    """Where a probe looks; a test may look elsewhere."""

    dev: Path = Path("/dev")
    module: Path = Path("/proc/driver/nvidia/version")
    library: str = LIBRARY


def probe(machine: Machine = Machine()) -> Probe:
    """Usable where a GPU is visible that there are kernels for, with a driver that the installed PyTorch runs on."""
    torch = torch_build()
    names = listed(machine.dev)
    nodes = [name for name in names if name.startswith(NODE) and whole_number(name.removeprefix(NODE)) is not None]
    setting = os.environ.get(VARIABLE)
    try:
        driver = read_driver(machine.library, slices(setting))
    except NvmlError as error:
        return no_device("cuda", _nothing(machine, nodes, str(error)), torch)
    gpus = visible_gpus(driver, setting)
    if not gpus:
        return no_device("cuda", _none_visible(driver, setting), torch)
    reason = (
        interpreter_missing(torch)
        or silent(gpus)
        or too_old(driver, torch)
        or kernels_for_any([gpu.arch for gpu in gpus if not gpu.fault], "nvidia")
    )
    unless = {} if interpreter_missing(torch) else INTERPRETED
    told = f"driver {driver.version}, CUDA {'.'.join(map(str, driver.cuda)) or 'unknown'}"
    return Probe(not reason, reason or told, tuple(gpu.text for gpu in gpus), unless=unless)


def visible_gpus(driver: Driver, setting: str | None) -> list[Gpu]:
    """The GPUs, and slices of them, that CUDA_VISIBLE_DEVICES leaves."""
    known = [*driver.gpus, *driver.slices]
    return [known[at] for at in visible(setting, len(driver.gpus), [gpu.uuid for gpu in known])]


def slices(setting: str | None) -> list[str]:
    """The slices of GPUs that CUDA_VISIBLE_DEVICES names."""
    return [entry.strip() for entry in (setting or "").split(",") if entry.strip().startswith(ONE_SLICE)]


def silent(gpus: list[Gpu]) -> str:
    """Why none of the visible GPUs can be taken; "" if NVML can ask one or more."""
    if any(not gpu.fault for gpu in gpus):
        return ""
    return f"NVML can ask no NVIDIA GPU that is visible: {_texts(gpus)}; mend them, or make others visible"


def too_old(driver: Driver, torch: TorchBuild | None) -> str:
    """Why the installed PyTorch does not run on the driver; "" if it does, or where the driver's CUDA is unknown.

    CUDA promises that what is built with any minor version of a major one runs on every driver of that major version
    and of later ones (CUDA Compatibility, "Minor Version Compatibility").
    """
    if torch is None or not torch.cuda:
        version = "" if torch is None else f" {torch.version}"
        return f"the installed PyTorch{version} is built without CUDA; install its build for CUDA"
    if driver.fault:
        return (
            f"the driver {driver.version} brings no library of CUDA ({driver.fault}); install its newest one, or in a "
            "container give it the driver's `compute` part"
        )
    if driver.cuda and driver.cuda[:1] < numbers(torch.cuda)[:1]:
        have = ".".join(map(str, driver.cuda))
        return (
            f"the driver {driver.version} is too old: it runs CUDA up to {have}, and PyTorch {torch.version} is built "
            f"with CUDA {torch.cuda}; update the driver, or install PyTorch's build for CUDA {driver.cuda[0]}"
        )
    return ""


def _none_visible(driver: Driver, setting: str | None) -> str:
    if not driver.gpus:
        return f"no NVIDIA GPU: the driver {driver.version} is there, and NVML lists no GPU"
    return f"no NVIDIA GPU is visible: {VARIABLE} = {setting!r} hides all that NVML lists: {_texts(driver.gpus)}"


def _texts(gpus: Iterable[Gpu]) -> str:
    return ", ".join(gpu.text for gpu in gpus)


def _nothing(machine: Machine, nodes: list[str], error: str) -> str:
    """What was looked for and what was found where NVML does not answer."""
    driver = "is there" if os.path.exists(machine.module) else "is absent"
    shown = ", ".join(nodes) if nodes else "none"
    where = f"device nodes {machine.dev}/nvidia*: {shown}; driver {machine.module}: {driver}; NVML: {error}"
    hint = "; in a container, give it the GPU and the driver's `utility` part" if nodes else ""
    return f"no NVIDIA GPU was found ({where}{hint})"
