"""What the entry point names: registers the backend, and imports nothing but the contract."""

from __future__ import annotations

from lineshaft_contract.backends import BackendInfo
from lineshaft_contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            name="cuda",
            probe="lineshaft_cuda.probe:probe",
            factory="lineshaft_cuda.backend:create",
            devices="lineshaft_cuda:devices",
            options="lineshaft_cuda.options:CudaOptions",
            toolchain="lineshaft_cuda.toolchain:create",
            summary="NVIDIA GPUs through PyTorch and Triton",
        )
    ]
