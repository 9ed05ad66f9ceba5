"""What the entry point names: registers the backend, and imports nothing but the contract."""

from __future__ import annotations

from lineshaft_contract.backends import BackendInfo
from lineshaft_contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            name="rocm",
            probe="lineshaft_rocm.probe:probe",
            factory="lineshaft_rocm.backend:create",
            devices="lineshaft_rocm:devices",
            options="lineshaft_rocm.options:RocmOptions",
            toolchain="lineshaft_rocm.toolchain:create",
            summary="AMD GPUs through PyTorch and Triton",
        )
    ]
