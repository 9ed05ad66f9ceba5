"""Looks whether the rocm backend can run here: at the kernel driver's own lists, and what is installed. Imports no
library of the vendor, nor PyTorch or Triton."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lineshaft_contract.backends import Probe
from lineshaft_rocm.topology import NODES, nodes, read_gpus
from lineshaft_triton.probing import INTERPRETED, TorchBuild, interpreter_missing, no_device, torch_build, visible
from lineshaft_triton.targets import kernels_for_any

VARIABLE = "HIP_VISIBLE_DEVICES"
OTHERS = ("ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""Variables that number devices too, on other levels of AMD's stack."""


@dataclass(frozen=True)
class Machine:
    """Where a probe looks; a test may look elsewhere."""

    kfd: Path = Path("/dev/kfd")
    sys: Path = Path("/sys")


def probe(machine: Machine = Machine()) -> Probe:
    """Usable where a GPU is visible that there are kernels for, and PyTorch is built for ROCm."""
    torch = torch_build()
    gpus = read_gpus(machine.sys)
    if not gpus:
        return no_device("rocm", _nothing(machine), torch)
    chosen = [gpus[at] for at in visible(os.environ.get(VARIABLE), len(gpus), [gpu.uuid for gpu in gpus])]
    if not chosen:
        hidden = f"{VARIABLE} = {os.environ.get(VARIABLE)!r} hides all that the driver lists"
        return no_device("rocm", f"no AMD GPU is visible: {hidden}: {', '.join(gpu.text for gpu in gpus)}", torch)
    reason = (
        interpreter_missing(torch)
        or without_rocm(torch)
        or closed(machine.kfd)
        or renumbered(os.environ)
        or kernels_for_any([gpu.arch for gpu in chosen], "amd")
    )
    unless = {} if interpreter_missing(torch) else INTERPRETED
    told = f"PyTorch is built for ROCm {torch.hip if torch else ''}"
    return Probe(not reason, reason or told, tuple(gpu.text for gpu in chosen), unless=unless)


def without_rocm(torch: TorchBuild | None) -> str:
    """Why the installed PyTorch does not drive the GPU; "" if it does."""
    if torch is not None and torch.hip:
        return ""
    version = "" if torch is None else f" {torch.version}"
    return f"the installed PyTorch{version} is built without ROCm; install its build for ROCm"


def closed(kfd: Path) -> str:
    """Why this process may not use the GPUs; "" if it may."""
    if os.access(kfd, os.R_OK | os.W_OK):
        return ""
    return f"{kfd} may not be opened by this user; add the user to the groups `render` and `video`, or pass the device"


def renumbered(environment: Mapping[str, str]) -> str:
    """Which variable beside HIP_VISIBLE_DEVICES renumbers devices, so that two counts would be mixed up; "": none."""
    own = environment.get(VARIABLE)
    for name in OTHERS:
        if environment.get(name) not in (None, own):
            return (
                f"{name} = {environment[name]!r} renumbers devices on another level than {VARIABLE}; unset it, and "
                f"name the devices in {VARIABLE} alone"
            )
    return ""


def _nothing(machine: Machine) -> str:
    """What was looked for and what was found where the driver lists no GPU."""
    node = "is there" if os.path.exists(machine.kfd) else "is absent"
    count = len(nodes(machine.sys))
    return f"no AMD GPU was found ({machine.kfd}: {node}; GPUs under {machine.sys / NODES}: none of {count} nodes)"
