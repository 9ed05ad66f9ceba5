"""What the entry point names: registers the backend, and imports nothing but the contract."""

from __future__ import annotations

from lineshaft_contract.backends import BackendInfo
from lineshaft_contract.hooks import hookimpl


@hookimpl
def lineshaft_backends() -> list[BackendInfo]:
    return [
        BackendInfo(
            name="tpu",
            probe="lineshaft_tpu.probe:probe",
            factory="lineshaft_tpu.backend:create",
            options="lineshaft_tpu.options:TpuOptions",
            toolchain="lineshaft_tpu.toolchain:create",
            devices="lineshaft_tpu:devices",
            single_program=True,
            summary="Google TPUs through JAX, and JAX on the CPU where asked",
        )
    ]
