"""Machines with GPUs that are not there: an NVML of our own making, folders like /sys, and builds of PyTorch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lineshaft_triton import probing
from lineshaft_triton.probing import TorchBuild

Nvml = Callable[..., str]
"""(gpus, arch "9.0", cuda driver version 12040, status of nvmlInit_v2, a function that it lacks) -> the path of a
library, which heeds the variable NVML_STUB."""


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Nvml:
    source, made = Path(__file__).with_name("nvml_stub.c"), tmp_path_factory.mktemp("nvml")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))

    def make(gpus: int = 2, arch: str = "9.0", cuda: int = 12040, fail: int = 0, lacks: str = "") -> str:
        path = made / f"{gpus}-{arch}-{cuda}-{fail}-{lacks}.so"
        major, minor = arch.split(".")
        facts = {"GPUS": gpus, "MAJOR": major, "MINOR": minor, "CUDA": cuda, "FAIL": fail}
        defines = [f"-D{name}={value}" for name, value in facts.items()]
        defines += [f"-D{lacks}=another"] if lacks else []
        if not path.exists():
            subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", str(path), str(source)], check=True)
        return str(path)

    return make


@pytest.fixture(autouse=True)
def unset_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine, and of tests that interpret."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let probes find that PyTorch (None: none), and Triton or not."""

    def set_to(build: TorchBuild | None, triton: bool = True) -> None:
        for vendor in ("cuda", "rocm"):
            monkeypatch.setattr(f"lineshaft_{vendor}.probe.torch_build", lambda: build)
        monkeypatch.setattr(probing, "find_spec", lambda name: object() if name == "triton" and triton else None)

    return set_to
