"""What the entry point names: registers the backend, and imports nothing but the contract."""

from __future__ import annotations

from lineshaft_contract.backends import BackendInfo, BackendKind
from lineshaft_contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            name="cpu",
            probe="lineshaft_cpu.probe:probe",
            factory="lineshaft_cpu.backend:create",
            options="lineshaft_cpu.options:CpuOptions",
            devices="lineshaft_cpu:devices",
            kind=BackendKind.HOST,
            summary="the host's CPU: kernels in C, or PyTorch's",
        )
    ]
