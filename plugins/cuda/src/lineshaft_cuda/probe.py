"""Looks whether the cuda backend can run here: at device nodes, the driver, and what is installed. Imports neither
PyTorch nor Triton, and creates no context on a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lineshaft_contract.backends import Probe
from lineshaft_cuda.nvml import LIBRARY, Driver, Gpu, NvmlError, read_driver
from lineshaft_triton.probing import (
    INTERPRETED,
    TorchBuild,
    interpreter_missing,
    no_device,
    numbers,
    torch_build,
    visible,
)
from lineshaft_triton.targets import kernels_for_any

VARIABLE = "CUDA_VISIBLE_DEVICES"
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
    nodes = sorted(path.name for path in machine.dev.glob("nvidia[0-9]*"))
    setting = os.environ.get(VARIABLE)
    try:
        driver = read_driver(machine.library, slices(setting))
    except NvmlError as error:
        return no_device("cuda", _nothing(machine, nodes, str(error)), torch)
    gpus = visible_gpus(driver, setting)
    if not gpus:
        return no_device("cuda", _none_visible(driver, setting), torch)
    reason = (
        interpreter_missing(torch) or too_old(driver, torch) or kernels_for_any([gpu.arch for gpu in gpus], "nvidia")
    )
    unless = {} if interpreter_missing(torch) else INTERPRETED
    told = f"driver {driver.version}, CUDA {'.'.join(map(str, driver.cuda))}"
    return Probe(not reason, reason or told, tuple(gpu.text for gpu in gpus), unless=unless)


def visible_gpus(driver: Driver, setting: str | None) -> list[Gpu]:
    """The GPUs, and slices of them, that CUDA_VISIBLE_DEVICES leaves."""
    known = [*driver.gpus, *driver.slices]
    return [known[at] for at in visible(setting, len(driver.gpus), [gpu.uuid for gpu in known])]


def slices(setting: str | None) -> list[str]:
    """The slices of GPUs that CUDA_VISIBLE_DEVICES names."""
    return [entry.strip() for entry in (setting or "").split(",") if entry.strip().startswith(ONE_SLICE)]


def too_old(driver: Driver, torch: TorchBuild | None) -> str:
    """Why the installed PyTorch does not run on the driver; "" if it does.

    CUDA promises that what is built with any minor version of a major one runs on every driver of that major version
    and of later ones (CUDA Compatibility, "Minor Version Compatibility").
    """
    if torch is None or not torch.cuda:
        version = "" if torch is None else f" {torch.version}"
        return f"the installed PyTorch{version} is built without CUDA; install its build for CUDA"
    if driver.cuda[:1] < numbers(torch.cuda)[:1]:
        have = ".".join(map(str, driver.cuda))
        return (
            f"the driver {driver.version} is too old: it runs CUDA up to {have}, and PyTorch {torch.version} is built "
            f"with CUDA {torch.cuda}; update the driver, or install PyTorch's build for CUDA {driver.cuda[0]}"
        )
    return ""


def _none_visible(driver: Driver, setting: str | None) -> str:
    if not driver.gpus:
        return f"no NVIDIA GPU: the driver {driver.version} is there, and NVML lists no GPU"
    gpus = ", ".join(gpu.text for gpu in driver.gpus)
    return f"no NVIDIA GPU is visible: {VARIABLE} = {setting!r} hides all that NVML lists: {gpus}"


def _nothing(machine: Machine, nodes: list[str], error: str) -> str:
    """What was looked for and what was found where NVML does not answer."""
    driver = "is there" if machine.module.exists() else "is absent"
    shown = ", ".join(nodes) if nodes else "none"
    where = f"device nodes {machine.dev}/nvidia*: {shown}; driver {machine.module}: {driver}; NVML: {error}"
    hint = "; in a container, give it the GPU and the driver's `utility` part" if nodes else ""
    return f"no NVIDIA GPU was found ({where}{hint})"
